"""Ten thousand hostile frames against a running fedsea server: the others train on, and its memory stays bounded."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

import grpc
import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import fedsea
from fedsea.client.invitation import fetch_invitation
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoder
from fedsea.wire.frames import PROTOCOL_VERSION
from fedsea.wire.identity import Identity
from tests.fault import frames

NUM_FRAMES = 10_000
MADE = 4_000
"""Of them, frames that hypothesis makes from nothing; the others are real ones, mutated."""
STREAMS = 3  # a name may have four streams at once
LARGEST_GROWTH = 96 << 20


def hostile_frames() -> list[list[bytes]]:
    made: list[list[bytes]] = []

    @settings(
        max_examples=MADE,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(chunks=frames.made())
    def collect(chunks: list[bytes]) -> None:
        made.append(chunks)

    collect()
    random = Random(0)
    return [*made[:MADE], *(frames.mutate(random) for _ in range(NUM_FRAMES - len(made[:MADE])))]


def attacks(plan: fedsea.FederationPlan) -> Iterator[list[bytes]]:
    """Hostile frames: first thing on a stream, after a handshake as an observer, and after one as a trainer."""
    encoder = Encoder("client", {Channel.HIDDEN: "fp32", Channel.GRADIENT: "fp32"})

    def chunks(*messages: m.Message) -> list[bytes]:
        return [chunk for message in messages for chunk in encoder.encode(message).chunks]

    hello = m.Hello(PROTOCOL_VERSION, fedsea.__version__)
    openings = [
        [],
        chunks(hello, m.Join(plan.sha256(), 0, -1, 0, "observe")),
        chunks(hello, m.Join(plan.sha256(), 0, -1, 0, "train")),
    ]
    for number, frame in enumerate(hostile_frames()):
        yield openings[number % len(openings)] + frame


def valid_but_out_of_place(hidden_size: int, plan: fedsea.FederationPlan) -> list[list[bytes]]:
    """Messages that decode, after a correct handshake, and that the server must refuse for what they say."""
    encoder = Encoder("client", {Channel.HIDDEN: "fp32", Channel.GRADIENT: "fp32"})
    boundary = Boundary("trusted-server")

    def hidden() -> object:
        return boundary.hidden(torch.ones(6, hidden_size))

    def forward(step: int, start: int, stop: int, count: int) -> m.Message:
        return m.Forward(step, 0, 0, count, BlockRange(start, stop), (6,), 3, False, hidden())

    wrong = [
        forward(999, 1, 4, 1),
        forward(0, 0, 5, 1),
        forward(0, 1, 4, 7),
        m.Backward(999, 0, 0, boundary.gradient(torch.ones(6, hidden_size))),
        m.StepReady(999, 0, 3, 1.0),
        m.RoundUpdate(77, 5, {}),
    ]
    hello = m.Hello(PROTOCOL_VERSION, fedsea.__version__)
    join = m.Join(plan.sha256(), 0, -1, 0, "train")
    opening = [c for message in (hello, join) for c in encoder.encode(message).chunks]
    return [opening + list(encoder.encode(message).chunks) for message in wrong]


async def throw_all(address: str, identity: Identity, all_chunks: Sequence[list[bytes]]) -> Counter[grpc.StatusCode]:
    endings: Counter[grpc.StatusCode] = Counter()
    waiting = iter(all_chunks)

    async def worker(thrower: frames.Thrower) -> None:
        for chunks in waiting:
            endings[await thrower.throw(chunks)] += 1

    async with frames.Thrower(address, identity) as thrower:
        await asyncio.gather(*(worker(thrower) for _ in range(STREAMS)))
    return endings


@pytest.mark.timeout(400)
def test_ten_thousand_hostile_frames_disturb_nobody(federation):
    # Nobody is ever "d", so the server does not end when the others have left; "c" says goodbye many times below.
    training = {"wait": 0.2, "min_clients": 1, "rounds": 2, "steps_per_round": 8}
    fed = federation("a", "b", "c", "d", training=training)
    server = fed.spawn_server()
    identity = Identity.load(fed.identities / "c")
    process = psutil.Process(server.pid)
    plan = asyncio.run(fetch_invitation(fed.address, identity)).plan
    hostile = list(attacks(plan))  # made before the clients start: a server whose run is over does not wait for them
    asyncio.run(throw_all(fed.address, identity, hostile[:200]))
    before = process.memory_info().rss

    clients = [fed.spawn_client(name) for name in ("a", "b")]
    endings = asyncio.run(throw_all(fed.address, identity, hostile))
    endings += asyncio.run(throw_all(fed.address, identity, valid_but_out_of_place(32, plan)))

    assert endings.total() == NUM_FRAMES + 6
    assert endings[grpc.StatusCode.INTERNAL] == endings[grpc.StatusCode.UNKNOWN] == 0, endings
    assert endings[grpc.StatusCode.INVALID_ARGUMENT] > NUM_FRAMES // 2, endings
    assert process.is_running()
    assert process.memory_info().rss - before < LARGEST_GROWTH
    for client in clients:
        client.finish()
    assert fed.durable()["server"][1]["next_step"] == 16
