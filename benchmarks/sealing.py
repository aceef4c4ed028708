"""What sealing costs on top of TLS: CPU seconds a gigabyte, a round trip and a training step, sealed against unsealed.

    python benchmarks/sealing.py --shape 100m

Three levels, each with sides that take turns: the sealed layer by itself (AES-256-GCM on chunks in one process);
messages that go to a server and back over the loopback with mutual TLS (both ends in one process); training steps of a
client process and a server process, under two plans that differ in `wire.sealed` alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import time
from typing import Any

from _harness import Workspace, arguments, end, finish, workspace
from _inputs import SHAPES, write_silo
from train_step import NAME, Side, plan_sections

GB = 1e9
WIDTH = 1024
SMALL_ROWS = 2
"""Rows of the small message: 8 KB, a decoded token of a model of that width, or two."""


# --- the layer by itself ----------------------------------------------------------------------------------------------


def layer(num_bytes: int) -> dict[str, float]:
    """CPU seconds a gigabyte of sealing and of opening full chunks."""
    from fedsea.wire.limits import CHUNK_BYTES
    from fedsea.wire.sealing.keys import derive

    shared = os.urandom(32)
    client, server = derive(shared, bytes(32), "client"), derive(shared, bytes(32), "server")
    chunk, spent = os.urandom(CHUNK_BYTES), [0.0, 0.0]
    num_chunks = max(1, num_bytes // CHUNK_BYTES)
    for _ in range(num_chunks):
        start = time.thread_time()
        record = client.sealer.seal(chunk)
        middle = time.thread_time()
        server.opener.open(record)
        spent = [spent[0] + middle - start, spent[1] + time.thread_time() - middle]
    gigabytes = num_chunks * CHUNK_BYTES / GB
    return {"seal_cpu_s_per_gb": spent[0] / gigabytes, "open_cpu_s_per_gb": spent[1] / gigabytes}


# --- messages over the loopback ---------------------------------------------------------------------------------------


class Echo:
    """A server that sends every hidden state back, and a client of it."""

    def __init__(self, space: Workspace, *, sealed: bool) -> None:
        from fedsea.types import Channel
        from fedsea.wire.identity import Identity
        from fedsea.wire.limits import WireLimits

        self.sealed = sealed
        self._root = space.root
        self._server = Identity.load(space.root / "server")
        self._client = Identity.load(space.root / NAME / "identity")
        self._codecs = {Channel.HIDDEN: "fp32", Channel.GRADIENT: "fp32"}
        self._limits = WireLimits(WIDTH, 1 << 16, 8, 256 << 20, self._codecs, {}, 6)

    async def _handle(self, session: Any) -> None:
        from fedsea.types import Reply
        from fedsea.wire import messages as m
        from fedsea.wire.encoding import Encoder

        session.limits, session.encoder = self._limits, Encoder("server", self._codecs)
        async for message in session:
            await session.send(m.Output(message.step, 0, 0, False, Reply(message.tensors)))

    @contextlib.asynccontextmanager
    async def stream(self) -> Any:
        """An open stream to it."""
        from fedsea.wire.channel import connect
        from fedsea.wire.encoding import Encoder
        from fedsea.wire.identity import PeerGate
        from fedsea.wire.limits import HANDSHAKE
        from fedsea.wire.server import serve

        gate = PeerGate(self._root / "ca")
        options = {"status": lambda _: {}, "limits": HANDSHAKE, "sealed": self.sealed}
        server = await serve("127.0.0.1:0", self._server, gate, self._handle, **options)
        encoder = Encoder("client", self._codecs)
        address = f"127.0.0.1:{server.port}"
        async with await connect(address, self._client, limits=self._limits, encoder=encoder) as stream:
            assert stream.sealed is self.sealed
            yield stream
        await server.stop()


async def there_and_back(stream: Any, rows: int, count: int) -> tuple[float, float]:
    """Send a message and receive it, so many times; CPU seconds of both ends, and by the clock."""
    import torch

    from fedsea.privacy.boundary import Boundary
    from fedsea.types import BlockRange
    from fedsea.wire import messages as m

    boundary, hidden_TH = Boundary("trusted-server"), torch.ones(rows, WIDTH)
    cpu, clock = time.process_time(), time.perf_counter()
    for step in range(count):
        message = m.Forward(step, 0, 0, 1, BlockRange(1, 5), (rows,), rows, False, boundary.hidden(hidden_TH))
        sending = asyncio.create_task(stream.send(message))
        await stream.receive()
        await sending
    return time.process_time() - cpu, time.perf_counter() - clock


async def messages(space: Workspace, args: argparse.Namespace) -> dict[str, float]:
    """Large and small messages, sealed and unsealed in turns."""
    rows = (args.message_mb << 20) // (4 * WIDTH)
    turns: dict[tuple[bool, int], list[tuple[float, float]]] = {}
    async with Echo(space, sealed=True).stream() as sealed, Echo(space, sealed=False).stream() as unsealed:
        for turn in range(args.turns + 1):
            for side in ((sealed, unsealed), (unsealed, sealed))[turn % 2]:
                for size, count in ((rows, args.messages), (SMALL_ROWS, args.round_trips)):
                    spent = await there_and_back(side, size, count)
                    if turn:  # the first one warms up
                        turns.setdefault((side is sealed, size), []).append(spent)
    gigabytes = 2 * args.messages * rows * 4 * WIDTH / GB

    def per(value: float, is_sealed: bool, size: int, which: int) -> float:
        return statistics.median(spent[which] for spent in turns[is_sealed, size]) / value

    def ratio(size: int, which: int) -> float:
        pairs = zip(turns[True, size], turns[False, size], strict=True)
        return statistics.median(ours[which] / theirs[which] for ours, theirs in pairs)

    return {
        "sealed_over_unsealed_cpu_per_gb": ratio(rows, 0),
        "sealed_over_unsealed_cpu_per_round_trip": ratio(SMALL_ROWS, 0),
        "sealed_over_unsealed_wall_per_round_trip": ratio(SMALL_ROWS, 1),
        "sealed_cpu_s_per_gb": per(gigabytes, True, rows, 0),
        "unsealed_cpu_s_per_gb": per(gigabytes, False, rows, 0),
        "sealed_cpu_us_per_round_trip": per(args.round_trips / 1e6, True, SMALL_ROWS, 0),
        "unsealed_cpu_us_per_round_trip": per(args.round_trips / 1e6, False, SMALL_ROWS, 0),
    }


# --- training steps ---------------------------------------------------------------------------------------------------


def training(space: Workspace, args: argparse.Namespace) -> dict[str, Any]:
    """A federation of one client under a sealed plan, and one under an unsealed plan, in turns."""
    num_steps = args.warmup + args.pairs * args.steps
    sides: list[Side] = []
    with contextlib.ExitStack() as stack:
        workers = []
        for sealed in (True, False):
            sections = plan_sections(args, num_steps, input_frozen=False)
            sections["wire"] = {**sections["wire"], "sealed": sealed}
            server, address = stack.enter_context(space.server(space.write_plan(sections, [NAME])))
            client = stack.enter_context(space.client(NAME, address))
            client.answer()
            workers += [client, server]
            sides.append(Side(client, server))
        for side in sides:
            side.turn(args.warmup)
        for number in range(args.pairs):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.turn(args.steps)
            ours, theirs = (sum(side.turns[-1]["cpu_s"]) for side in sides)
            print(f"pair {number + 1}/{args.pairs}: CPU {ours / theirs:.3f}", file=sys.stderr)
        end(*workers)
    sealed_turns, unsealed_turns = (side.turns[1:] for side in sides)
    pairs = list(zip(sealed_turns, unsealed_turns, strict=True))
    cpu = [sum(ours["cpu_s"]) / sum(theirs["cpu_s"]) for ours, theirs in pairs]
    assert sides[0].turns[0]["first_loss"] == sides[1].turns[0]["first_loss"]
    return {
        "sealed_over_unsealed_cpu_per_step": statistics.median(cpu),
        "sealed_over_unsealed_cpu_per_step_range": [min(cpu), max(cpu)],
        "sealed_over_unsealed_wall_per_step": statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs),
        "sealed_cpu_s_per_step": statistics.median(sum(turn["cpu_s"]) / args.steps for turn in sealed_turns),
        "unsealed_cpu_s_per_step": statistics.median(sum(turn["cpu_s"]) / args.steps for turn in unsealed_turns),
        "bytes_per_step": (sealed_turns[-1]["up"] + sealed_turns[-1]["down"]) / num_steps,
    }


def main() -> None:
    """All three levels."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--sequences", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--codec", choices=("fp32", "bf16", "fp16", "int8"), default="fp32")
    parser.add_argument("--pairs", type=int, default=12, help="turns of each side, of training")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side that do not count")
    parser.add_argument("--turns", type=int, default=12, help="turns of each side, of messages")
    parser.add_argument("--message-mb", type=int, default=16, help="of a large message")
    parser.add_argument("--messages", type=int, default=8, help="large ones of a turn")
    parser.add_argument("--round-trips", type=int, default=200, help="small ones of a turn")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.sequences, args.tokens, args.pairs, args.steps, args.warmup = "tiny", 2, 32, 2, 2, 1
        args.turns, args.message_mb, args.messages, args.round_trips = 1, 1, 2, 10
    shape, settings = SHAPES[args.shape], {key: value for key, value in vars(args).items() if key != "out"}
    with workspace(shape, args.threads) as space:
        space.enroll(NAME)
        write_silo(space.data(NAME), shape, (args.tokens, args.tokens))
        result = {**layer((8 << 20) if args.tiny else (1 << 30)), **asyncio.run(messages(space, args))}
        result |= training(space, args)
    finish("sealing", settings, result, args.out)


if __name__ == "__main__":
    main()
