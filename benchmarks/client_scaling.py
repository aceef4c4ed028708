"""Training throughput of a whole federation against the number of clients: taking turns, and as one batch.

    python benchmarks/client_scaling.py --clients 1 2 4 8 --rtt-ms 20 --mbit 100

For each number of clients two federations are up at once, one in each mode, every client a process with an emulated
link of its own to its server. They take turns of one round (every client takes the same number of steps), one idle
while the other runs; figures are medians over the turns. See README.md for what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from _harness import Worker, Workspace, arguments, difference, end, finish, workspace
from _inputs import SHAPES, write_silo

MODES = ("sequential", "batched")


@dataclass(slots=True)
class Turn:
    """What one round cost."""

    wall_s: float
    num_tokens: int
    client_cpu_s: float
    server_cpu_s: float
    num_bytes: int
    link_bytes: int
    phases: dict[str, float]
    server_probes: dict[str, list[float]]

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together."""
        return self.num_tokens / self.wall_s


@dataclass(slots=True)
class Federation:
    """A server, its clients, and the proxy between them, if there is one."""

    server: Worker
    clients: list[Worker]
    proxy: Worker | None
    turns: list[Turn] = field(default_factory=list)
    seconds_per_token: list[dict[str, float]] = field(default_factory=list)
    _bytes: int = 0

    def turn(self, num_steps: int) -> None:
        """One round: every client takes so many steps, together or one after the other, as the plan says."""
        probes, link = self.server.ask()["probes"], self._link_bytes()
        client_cpu, server_cpu = sum(client.cpu_s for client in self.clients), self.server.cpu_s
        start = time.perf_counter()
        for client in self.clients:
            client.order(num_steps)
        answers = [client.answer() for client in self.clients]
        wall = time.perf_counter() - start
        total = sum(answer["up"] + answer["down"] for answer in answers)
        turn = Turn(
            wall_s=wall,
            num_tokens=sum(answer["num_tokens"] for answer in answers),
            client_cpu_s=sum(client.cpu_s for client in self.clients) - client_cpu,
            server_cpu_s=self.server.cpu_s - server_cpu,
            num_bytes=total - self._bytes,
            link_bytes=self._link_bytes() - link,
            phases={key: sum(answer["phases"][key] for answer in answers) for key in answers[0]["phases"]},
            server_probes=difference(self.server.ask()["probes"], probes),
        )
        self._bytes = total
        self.turns.append(turn)
        self.seconds_per_token = [answer["seconds_per_token"] for answer in answers]

    def replay(self, seconds_per_token: list[dict[str, float]]) -> None:
        """Let every client stand for a machine of its own from now on."""
        for client, seconds in zip(self.clients, seconds_per_token, strict=True):
            client.order(seconds)

    def _link_bytes(self) -> int:
        return 0 if self.proxy is None else int(self.proxy.ask()["bytes"])


def plan_sections(args: argparse.Namespace, mode: str) -> dict[str, dict[str, Any]]:
    """One round a turn, and one more to warm up."""
    return {
        "adapter": {"rank": 8},
        "training": {
            "mode": mode,
            "rounds": args.repeats + 1,
            "steps_per_round": args.steps,
            "micro_batches": args.micro_batches,
            "in_flight": max(1, args.micro_batches),
            "micro_batch_sequences": args.sequences,
        },
        "data": {"max_tokens": args.tokens[1], "loss_on": "completion", "holdout": 0.0},
        "wire": {"hidden": args.codec, "gradient": args.codec},
    }


@contextlib.contextmanager
def federation(space: Workspace, args: argparse.Namespace, names: list[str], mode: str) -> Iterator[Federation]:
    """A federation whose clients are ready for their first step."""
    with contextlib.ExitStack() as stack:
        plan = space.write_plan(plan_sections(args, mode), names)
        server, address = stack.enter_context(space.server(plan, args.server_threads))
        proxy = None
        if args.rtt_ms or args.mbit:
            link = {"target": address, "rtt_ms": args.rtt_ms, "mbit": args.mbit}
            proxy = stack.enter_context(space.start("proxy", **link))
            address = proxy.answer()["address"]
        clients = [stack.enter_context(space.client(name, address, own_machine=args.own_machines)) for name in names]
        for client in clients:
            client.answer()
        yield Federation(server, clients, proxy)


def measure(space: Workspace, args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Both modes for these clients, in turns."""
    with contextlib.ExitStack() as stack:
        # One after the other, so that no more than one set of processes starts at a time.
        both = {mode: stack.enter_context(federation(space, args, names, mode)) for mode in MODES}
        for number in range(args.repeats + 1):
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                both[mode].turn(args.steps)
            if number == 0 and args.own_machines:
                # Taking turns, a client had the machine to itself: so long its passes take on one of its own.
                for mode in MODES:
                    both[mode].replay(both["sequential"].seconds_per_token)
            rates = ", ".join(f"{mode} {both[mode].turns[-1].tokens_per_s:.0f}" for mode in MODES)
            print(f"{len(names)} clients, turn {number}/{args.repeats}: {rates} tokens/s", file=sys.stderr)
        for mode in MODES:
            end(*both[mode].clients, both[mode].server)
    return figures(args, both, len(names))


def figures(args: argparse.Namespace, both: dict[str, Federation], num_clients: int) -> dict[str, Any]:
    """From the turns to the figures of one number of clients; the first turn was the warm-up."""
    counted = {mode: both[mode].turns[1:] for mode in MODES}
    pairs = list(zip(counted["batched"], counted["sequential"], strict=True))
    result: dict[str, Any] = {
        "batched_over_sequential": statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
    }
    for mode, turns in counted.items():
        client_steps = num_clients * args.steps * len(turns)
        tokens = sum(turn.num_tokens for turn in turns)
        server_phases = turns[0].server_probes
        result[mode] = {
            "tokens_per_s": statistics.median(turn.tokens_per_s for turn in turns),
            "client_cpu_s_per_1000_tokens": 1000 * sum(turn.client_cpu_s for turn in turns) / tokens,
            "server_cpu_s_per_1000_tokens": 1000 * sum(turn.server_cpu_s for turn in turns) / tokens,
            "cores_busy": statistics.median((t.client_cpu_s + t.server_cpu_s) / t.wall_s for t in turns),
            "bytes_per_token": sum(turn.num_bytes for turn in turns) / tokens,
            "link_over_frame_bytes": sum(t.link_bytes for t in turns) / sum(t.num_bytes for t in turns),
            "wall_s_per_client_step": {
                key: sum(turn.phases[key] for turn in turns) / client_steps for key in turns[0].phases
            },
            "server_wall_s_per_client_step": {
                key: sum(turn.server_probes[key][0] for turn in turns) / client_steps for key in server_phases
            },
        }
    batched = result["batched"]
    cpu_s_per_token = (batched["client_cpu_s_per_1000_tokens"] + batched["server_cpu_s_per_1000_tokens"]) / 1000
    most_tokens_per_s = (os.cpu_count() or 1) / cpu_s_per_token
    result["most_on_these_cores"] = most_tokens_per_s / result["sequential"]["tokens_per_s"]
    return result


def main() -> None:
    """Every number of clients after the other."""
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rtt-ms", type=float, default=20.0, help="of the emulated link")
    parser.add_argument("--mbit", type=float, default=100.0, help="of the emulated link, each way; both 0: no proxy")
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--sequences", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step; all of them in flight")
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 128), help="fewest and most of a sequence")
    parser.add_argument("--completion", type=float, default=0.25, help="share of a sequence's tokens that is learned")
    parser.add_argument(
        "--server-threads", type=int, default=os.cpu_count(), help="CPU threads of the server (default: every core)"
    )
    parser.add_argument(
        "--own-machines",
        action="store_true",
        help="clients wait as long as their passes take alone, instead of sharing this machine's cores",
    )
    parser.add_argument("--codec", choices=("fp32", "bf16", "fp16", "int8"), default="fp32")
    parser.add_argument("--steps", type=int, default=6, help="of each client in a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each mode that count")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.clients, args.tokens, args.steps, args.repeats = "tiny", [2], (8, 16), 2, 1
    shape, result = SHAPES[args.shape], {}
    with workspace(shape, args.threads) as space:
        names = [f"client-{number}" for number in range(max(args.clients))]
        for number, name in enumerate(names):
            space.enroll(name)
            write_silo(space.data(name), shape, tuple(args.tokens), args.completion, seed=number)
        for count in args.clients:
            result[str(count)] = measure(space, args, names[:count])
    most = str(max(args.clients))
    headline = {"batched_over_sequential": result[most]["batched_over_sequential"], "num_clients": int(most)}
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    finish("client_scaling", settings, {**headline, "by_clients": result}, args.out)


if __name__ == "__main__":
    main()
