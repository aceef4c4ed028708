"""Hostile frames: a decoder and a running server refuse them in words, keep their memory, and serve the others on."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis.strategies import SearchStrategy

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.wire import messages as m
from fedsea.wire.buffers import BufferPool
from fedsea.wire.encoding import Decoder
from fedsea.wire.frames import Role
from tests.contract.loopback import Federation, echo, forward, join, run, running
from tests.fault import frames

DRAWN = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


def draw(strategy: SearchStrategy[list[bytes]], count: int) -> list[list[bytes]]:
    """Frames, drawn once for all tests that throw the same: drawing takes longer than decoding."""
    found: list[list[bytes]] = []

    @settings(max_examples=count, **DRAWN)
    @given(chunks=strategy)
    def collect(chunks: list[bytes]) -> None:
        found.append(chunks)

    collect()
    return found


@pytest.fixture(scope="module")
def hostile() -> list[list[bytes]]:
    return draw(frames.hostile(), 1500)


@pytest.fixture(scope="module")
def mutated() -> list[list[bytes]]:
    return draw(frames.mutated(), 500)


def decode(chunks: Sequence[bytes], codec: str, role: Role) -> list[m.Message]:
    """What a decoder makes of chunks; anything but the two allowed errors is a failure."""
    pool = BufferPool()
    decoder = Decoder(frames.limits(codec), role, pool)
    messages = []
    for chunk in chunks:
        try:
            message = decoder.feed(chunk)
        except NonFiniteError:
            continue
        except ProtocolError:
            break
        if message is not None:
            messages.append(message)
    assert pool.num_bytes <= 8 * 4 * 64 * frames.HIDDEN_SIZE
    return messages


def check(message: m.Message) -> None:
    for tensor in getattr(message, "tensors", {}).values():
        assert bool(torch.isfinite(tensor).all())
    if isinstance(message, m.Forward):
        (tensor,) = message.tensors.values()  # type: ignore[union-attr]
        assert tuple(tensor.shape) == (sum(message.lengths), frames.HIDDEN_SIZE)
        assert message.blocks.stop <= 6


def decode_and_check(every: list[list[bytes]], codec: str, role: Role) -> None:
    assert len(every) > 400, "hypothesis ended early"
    for chunks in every:
        try:
            for message in decode(chunks, codec, role):
                check(message)
        except BaseException as error:
            error.add_note(f"by {chunks!r}")
            raise


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_decoder_refuses_or_decodes_and_never_breaks(role: Role, hostile: list[list[bytes]]) -> None:
    decode_and_check(hostile, "fp32", role)


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_mutated_frames_of_every_codec_are_refused_or_decoded(codec: str, mutated: list[list[bytes]]) -> None:
    decode_and_check(mutated, codec, "server")


def test_ten_thousand_random_mutations_of_real_frames() -> None:
    """Cheap mutations in bulk; the strategies above look in more places."""
    rng = random.Random(3)
    real = [one.chunks[0] for one in frames.encoded()]
    decoded = 0
    for _ in range(10_000):
        data = bytearray(rng.choice(real))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 160))] = rng.randrange(256)
        messages = decode([bytes(data)], "fp32", "server")
        decoded += len(messages)
        for message in messages:
            check(message)
    assert 0 < decoded < 9000


def test_the_strategies_reach_what_they_are_for() -> None:
    """A fuzz test whose frames all die at the magic number would prove nothing."""
    quick = settings(max_examples=12000, derandomize=True, database=None, deadline=None, phases=(Phase.generate,))
    for kind in (m.Forward, m.Join, m.RoundUpdate):
        real = [list(one.chunks) for one in frames.encoded() if one.kind == kind.__name__]
        find(
            frames.mutated(real),
            lambda chunks, kind=kind: any(type(found) is kind for found in decode(chunks, "fp32", "server")),
            settings=quick,
        )
    find(frames.built(), lambda chunks: bool(decode(chunks, "fp32", "server")), settings=quick)


def test_a_server_under_hostile_frames_serves_its_other_clients(tmp_path: Path, hostile: list[list[bytes]]) -> None:
    federation = Federation(tmp_path, "clinic", "mallory")

    async def work() -> None:
        async with running(federation) as (_, address):

            async def attack() -> int:
                async with frames.Thrower(address, federation.clients["mallory"]) as thrower:
                    codes = [await thrower.throw(chunks) for chunks in hostile[:300]]
                return len(codes)

            process = psutil.Process()
            async with await join(address, federation.clients["clinic"]) as stream:
                attacking = asyncio.create_task(attack())
                before, step = process.memory_info().rss, 0
                while not attacking.done():
                    await stream.send(forward(step, 256))
                    output = await stream.receive()
                    assert isinstance(output, m.Output)
                    assert output.step == step
                    step += 1
                assert await attacking == 300
                assert step > 10
                assert process.memory_info().rss - before < 64 << 20

    run(work(), timeout_s=90.0)


def test_a_half_sent_message_holds_up_nobody(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "clinic", "mallory")

    async def work() -> None:
        async with (
            running(federation) as (_, address),
            await join(address, federation.clients["mallory"]) as bad,
            await join(address, federation.clients["clinic"]) as good,
        ):
            whole = bad.encoder.encode(forward(1, 4096))
            half = dataclasses.replace(whole, chunks=whole.chunks[: len(whole.chunks) // 2])
            await bad.send(half)
            for step in range(5):
                await good.send(forward(step, 64))
                assert isinstance(await good.receive(), m.Output)

    run(work())


def test_the_handler_sees_why_a_hostile_stream_ended(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "mallory")
    seen: list[FedseaError] = []

    async def work() -> None:
        ended = asyncio.Event()

        async def handler(session: object) -> None:
            try:
                await echo(session)  # type: ignore[arg-type]
            except FedseaError as error:
                seen.append(error)
                raise
            finally:
                ended.set()

        async with running(federation, handler) as (_, address):
            async with frames.Thrower(address, federation.clients["mallory"]) as thrower:
                await thrower.throw([b"GET / HTTP/1.1\r\n\r\n"])
            await ended.wait()
        assert [type(error) for error in seen] == [ProtocolError]

    run(work())
