"""Random sessions from several client processes: each answer compared with the same alone, and no memory left behind.

The suite runs a small one (`test_sessions_soak.py`). The full one, 200 sequences from 8 processes, about a minute:

    python -m tests.fault.sessions_soak
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from fedsea.client.decoding import Sequences, SplitDecoder
from fedsea.client.results import status
from fedsea.errors import CapacityError, ProtocolError
from tests.support.decoding import VOCAB, alone, connected, family_checkpoint
from tests.support.federation import NAMES, Federation, make_identities
from tests.support.processes import DEADLINE_S, Child, Fault, _report_errors
from tests.support.proxy import CuttingProxy

SEED = 3
ENDINGS = ("close", "close", "close", "abort", "wrong", "kill")
CUT_EVERY_BYTES = 60_000
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256}
TOKEN_BYTES = 3 * 2 * 16 * 256 * 4
"""Keys and values of a token in the trunk's blocks: large beside the model, so that memory that is kept shows."""
PLAN = {"inference": {"lease_s": 1.0, "kv_memory_mb": 1024, "prefill_tokens": 8, "batch_tokens": 24}}
CUTS = {"b": {"input_blocks": 2}, "c": {"output_blocks": 2}}


@dataclass(frozen=True, slots=True)
class Seat:
    """One client process.

    Attributes:
        through: A proxy, or nothing.
        first: Its sequences before this one are done.
    """

    number: int
    name: str
    address: str
    through: str
    identity: Path
    model: Path
    count: int
    first: int = 0


def _client(seat: Seat, faults: tuple[Fault, ...], news: Connection) -> None:
    torch.set_num_threads(1)
    _report_errors(lambda news: _play(seat, news), faults, news)


def _play(seat: Seat, news: Connection) -> None:
    with connected(seat.address, seat.identity, seat.model, name=seat.name, through=seat.through) as decoder:
        reference = alone(decoder, seat.name)
        for number in range(seat.first, seat.count):
            draw = random.Random(f"{SEED} {seat.number} {number}")
            _sequence(draw, decoder, reference, lambda number=number: news.send(("sequence", number)))
            news.send(("sequence", number))
        for segment in (decoder.segments.input_blocks, decoder.segments.output_blocks):
            assert (segment.arena.pages, segment.arena.num_bytes) == (0, 0), "the client keeps memory"


def _sequence(draw: random.Random, decoder: SplitDecoder, reference: SplitDecoder, say) -> None:
    """Two sessions that take turns, from opening to one of the ends."""
    shapes = [(draw.choice((16, 40, 100)), draw.choice((1, 1, 2, 3))) for _ in range(2)]
    with ExitStack() as stack:
        pairs = [
            (stack.enter_context(decoder.open(*shape)), stack.enter_context(reference.open(*shape))) for shape in shapes
        ]
        for _ in range(draw.randint(3, 12)):
            _step(draw, *draw.choice(pairs))
        _end(draw.choice(ENDINGS), decoder, pairs[0][0], say)


def _step(draw: random.Random, got: Sequences, expected: Sequences) -> None:
    if draw.random() < 0.3:
        lengths = [draw.randint(0, length) for length in got.lengths]
        got.rollback(lengths)
        expected.rollback(lengths)
    if draw.random() < 0.3 and len(got.lengths) > 1:
        sources = [draw.randrange(len(got.lengths)) for _ in got.lengths]
        got.reorder(sources)
        expected.reorder(sources)
    tokens = []
    for length in got.lengths:
        most = min(got.max_tokens - length, draw.choice((1, 1, 4, 20)))
        tokens.append([draw.randrange(VOCAB) for _ in range(draw.randint(0, most))])
    if any(tokens):
        wanted = [min(2, len(ids)) for ids in tokens]
        logits = got.extend(tokens, wanted)
        torch.testing.assert_close(logits, expected.extend(tokens, wanted), rtol=1e-3, atol=1e-4)


def _end(ending: str, decoder: SplitDecoder, sequences: Sequences, say) -> None:
    if ending == "close":
        return
    count = len(sequences.lengths)
    room = min(4, sequences.max_tokens)
    rows = torch.randn(room * count, decoder.segments.input_blocks.hidden_size)

    def send(at: int):
        sealed = decoder.trunk.seal(decoder.boundary.hidden(rows))
        return sequences.session.extend(sealed, (at,) * count, (room,) * count)

    if ending == "wrong":
        with pytest.raises((ProtocolError, CapacityError), match=r"begins at token|opened for"):
            send(sequences.max_tokens).result(DEADLINE_S)
        return
    for _ in range(5):  # and nobody waits for the answers
        send(0)
    if ending == "kill":
        say()
        os.kill(os.getpid(), signal.SIGKILL)


def _follow(child: Child, done: int) -> int:
    """How many sequences a process has done when it ends, or is killed."""
    try:
        while child.news.poll(DEADLINE_S):
            kind, detail = child.news.recv()
            if kind == "error":
                raise AssertionError(f"a client failed: {detail}")
            if kind == "sequence":
                done = detail + 1
            if kind == "end":
                break
        else:
            raise AssertionError("a client says nothing any more")
    except EOFError:
        pass
    finally:
        child.end()
    return done


def _drive(seat: Seat) -> int:
    """All sequences of a seat; how many processes that took."""
    done = processes = 0
    while done < seat.count:
        done = _follow(Child(_client, replace(seat, first=done), ()), done)
        processes += 1
    return processes


def _wave(fed: Federation, num_processes: int, num_sequences: int, first_seat: int) -> int:
    with ExitStack() as stack, ThreadPoolExecutor(num_processes) as pool:
        cuts = [CUT_EVERY_BYTES * (1 + n) for n in range(1000)]
        proxy = stack.enter_context(CuttingProxy(fed.address, cuts))
        seats = [
            Seat(
                first_seat + number,
                name := NAMES[number % len(NAMES)],
                fed.address,
                proxy.address if number % 2 else "",
                fed.identities / name,
                Path(fed.plan.model.path),
                num_sequences // num_processes,
            )
            for number in range(num_processes)
        ]
        return sum(pool.map(_drive, seats))


def _left(fed: Federation) -> dict[str, int]:
    """What the server holds when the leases of those who were killed have run out; zeros, if all is well."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = status(fed.address, fed.identities / "a")["inference"]
        held = {key: found[key] for key in ("sessions", "sequences", "pages", "kv_bytes")}
        if not any(held.values()) or time.monotonic() > deadline:
            return held


def soak(folder: Path, identities: Path, num_processes: int, num_sequences: int) -> dict[str, object]:
    """Two waves; the server's memory is compared after each.

    Returns:
        What was done, what the server held after each wave, by how much its process grew in the second one, and how
        many bytes of keys and values went through it meanwhile.
    """
    model = family_checkpoint(folder / "model", "llama", **HEADS)
    fed = Federation(folder / "federation", model, identities, NAMES, {**PLAN, "clients": CUTS})
    try:
        server = psutil.Process(fed.spawn_server().pid)
        processes, resident, left, tokens = 0, [], [], []
        for wave in range(2):
            processes += _wave(fed, num_processes, num_sequences // 2, wave * num_processes)
            left.append(_left(fed))
            resident.append(server.memory_info().rss)
            tokens.append(status(fed.address, identities / "a")["inference"]["tokens"])
    finally:
        fed.close()
    return {
        "processes": processes,
        "left": left,
        "grown_bytes": resident[1] - resident[0],
        "passed_bytes": (tokens[1] - tokens[0]) * TOKEN_BYTES,
        "tokens": tokens[1],
    }


def main() -> None:
    """The full one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = soak(folder, make_identities(folder / "identities", NAMES), 8, 200)
    print(found)
    assert not any(any(held.values()) for held in found["left"]), "the server keeps memory of sessions"
    assert found["grown_bytes"] < found["passed_bytes"] / 4, "the server's memory grows"


if __name__ == "__main__":
    main()
