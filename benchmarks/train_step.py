"""One training step, split over the loopback against central: CPU seconds, wall time, phases, bytes.

    python benchmarks/train_step.py --shape 100m

A server, one client (mutual TLS between them) and a central training process hold the same model, adapters and rows.
They take turns of a few steps, one side idle while the other runs, so that whatever else the machine does meets both;
figures are medians over the turns. See README.md for what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from typing import Any

from _harness import Worker, Workspace, arguments, difference, end, finish, workspace
from _inputs import SHAPES, write_silo

NAME = "client"
BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def plan_sections(args: argparse.Namespace, num_steps: int, *, input_frozen: bool) -> dict[str, dict[str, Any]]:
    """The plan of the split run."""
    return {
        "adapter": {"rank": 8, "input": "frozen" if input_frozen else "adapter"},
        "training": {
            "steps_per_round": num_steps,
            "micro_batches": args.micro_batches,
            "in_flight": 2,
            "micro_batch_sequences": args.sequences,
        },
        "data": {"max_tokens": args.tokens, "loss_on": "all", "holdout": 0.0},
        "wire": {"hidden": args.codec, "gradient": args.codec},
    }


class Side:
    """One of the two that take turns: its processes, and what each turn cost.

    Args:
        steered: The process that takes steps when told.
        server: The server, on the split side.
    """

    def __init__(self, steered: Worker, server: Worker | None = None) -> None:
        self._steered = steered
        self._server = server
        self.turns: list[dict[str, Any]] = []

    def turn(self, num_steps: int) -> None:
        """Take steps and note what they cost."""
        before, cpu = self._counts(), self._cpu()
        answer = self._steered.ask(num_steps)
        answer["cpu_s"] = [after - start for after, start in zip(self._cpu(), cpu, strict=True)]
        answer["server_probes"] = difference(self._counts(), before)
        self.turns.append(answer)

    def _cpu(self) -> list[float]:
        return [worker.cpu_s for worker in (self._steered, self._server) if worker is not None]

    def _counts(self) -> dict[str, Any]:
        return {} if self._server is None else self._server.ask()["probes"]


def interleave(space: Workspace, args: argparse.Namespace) -> tuple[Side, Side, dict[str, float]]:
    """Warm both sides up, then let them take turns; the first turn of each in the result is the warm-up."""
    num_steps = args.warmup + args.pairs * args.steps
    plan = space.write_plan(plan_sections(args, num_steps, input_frozen=False), [NAME])
    shared = {"plan": str(plan), "data": str(space.data(NAME)), "name": NAME}
    with contextlib.ExitStack() as stack:
        server, address = stack.enter_context(space.server(plan))
        client = stack.enter_context(space.client(NAME, address))
        central = stack.enter_context(space.start("central", **shared))
        for worker in (client, central):
            worker.answer()
        split_side, central_side = Side(client, server), Side(central)
        for side in (split_side, central_side):
            side.turn(args.warmup)
        for number in range(args.pairs):
            # A B, B A, …: neither side always comes after the other.
            order = (split_side, central_side) if number % 2 == 0 else (central_side, split_side)
            for side in order:
                side.turn(args.steps)
            print(f"pair {number + 1}/{args.pairs}: {_pair_text(split_side, central_side)}", file=sys.stderr)
        heads = central.ask(-args.steps * args.pairs)["heads"]
        end(client, server, central)
    return split_side, central_side, heads


def frozen_payload(space: Workspace, args: argparse.Namespace) -> dict[str, float]:
    """Bytes where nothing is trained below the cut: three tensors a micro-batch travel, the input gradient does not."""
    plan = space.write_plan(plan_sections(args, args.warmup + args.steps, input_frozen=True), [NAME])
    with space.server(plan) as (server, address), space.client(NAME, address) as client:
        client.answer()
        side = Side(client, server)
        for num_steps in (args.warmup, args.steps):
            side.turn(num_steps)
        end(client, server)
    return _payload(args, side, num_passes=3)


def _pair_text(split: Side, central: Side) -> str:
    ours, theirs = split.turns[-1], central.turns[-1]
    return f"CPU {sum(ours['cpu_s']) / sum(theirs['cpu_s']):.3f}, wall {ours['wall_s'] / theirs['wall_s']:.3f}"


def figures(
    args: argparse.Namespace, split: Side, central: Side, heads: dict[str, float], num_passes: int
) -> dict[str, Any]:
    """From the turns to the figures."""
    ours, theirs = split.turns[1:], central.turns[1:]
    pairs = list(zip(ours, theirs, strict=True))
    cpu = [sum(a["cpu_s"]) / sum(b["cpu_s"]) for a, b in pairs]
    return {
        "split_over_central_cpu": statistics.median(cpu),
        "split_over_central_cpu_range": [min(cpu), max(cpu)],
        "split_over_central_wall": statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs),
        **_payload(args, split, num_passes),
        "central_cpu_s_per_step": _per_step(theirs, lambda turn: sum(turn["cpu_s"])),
        "client_cpu_s_per_step": _per_step(ours, lambda turn: turn["cpu_s"][0]),
        "server_cpu_s_per_step": _per_step(ours, lambda turn: turn["cpu_s"][1]),
        "central_tokens_per_s": statistics.median(turn["num_tokens"] / turn["wall_s"] for turn in theirs),
        "split_tokens_per_s": statistics.median(turn["num_tokens"] / turn["wall_s"] for turn in ours),
        "fedsea_over_transformers_head_cpu": heads["fedsea"] / heads["transformers"],
        "transformers_head_cpu_s": heads["transformers"],
        "first_loss": {"split": split.turns[0]["first_loss"], "central": central.turns[0]["first_loss"]},
        "wall_s_per_step": {
            phase: _per_step(ours, lambda turn, phase=phase: turn["phases"][phase]) for phase in ours[0]["phases"]
        },
        "cpu_s_per_step": _probe_figures(split),
    }


def _payload(args: argparse.Namespace, split: Side, num_passes: int) -> dict[str, float]:
    """Bytes of a step against the least that can travel."""
    turns = split.turns[1:]
    steps = sum(turn["num_steps"] for turn in turns)
    up, down = ((turns[-1][way] - split.turns[0][way]) / steps for way in ("up", "down"))
    tokens = sum(turn["num_tokens"] for turn in turns) / steps
    ideal = num_passes * tokens * SHAPES[args.shape].hidden_size * BYTES_PER_VALUE[args.codec]
    return {
        "payload_over_ideal": (up + down) / ideal,
        "bytes_up_per_step": up,
        "bytes_down_per_step": down,
        "ideal_bytes_per_step": ideal,
        "tokens_per_step": tokens,
    }


def _per_step(turns: list[dict[str, Any]], value: Any) -> float:
    return statistics.median(value(turn) / turn["num_steps"] for turn in turns)


def _probe_figures(split: Side) -> dict[str, float]:
    """CPU seconds of a step by probe, of the thread that ran it."""
    counted = split.turns[1:]
    steps = sum(turn["num_steps"] for turn in counted)
    client = difference(split.turns[-1]["probes"], split.turns[0]["probes"])
    result = {phase: values[1] / steps for phase, values in client.items()}
    for phase in counted[0]["server_probes"]:
        result[phase] = sum(turn["server_probes"][phase][1] for turn in counted) / steps
    return result


def main() -> None:
    """Both cases of the input segment, or one."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--sequences", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence, the longest if --unequal")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--unequal", action="store_true", help="lengths from a quarter of --tokens to all of it")
    parser.add_argument("--codec", choices=("fp32", "bf16", "fp16", "int8"), default="fp32")
    parser.add_argument("--pairs", type=int, default=12, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side that do not count")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.sequences, args.tokens, args.pairs, args.steps, args.warmup = "tiny", 2, 32, 2, 2, 1
    shape, settings = SHAPES[args.shape], {key: value for key, value in vars(args).items() if key != "out"}
    with workspace(shape, args.threads) as space:
        space.enroll(NAME)
        fewest = max(2, args.tokens // 4) if args.unequal else args.tokens
        write_silo(space.data(NAME), shape, (fewest, args.tokens))
        result = figures(args, *interleave(space, args), num_passes=4)
        frozen = frozen_payload(space, args)
    keys = ("payload_over_ideal", "bytes_up_per_step", "bytes_down_per_step")
    result["input_frozen"] = {key: frozen[key] for key in keys}
    finish("train_step", settings, result, args.out)


if __name__ == "__main__":
    main()
