"""What runs as one batch: everything that waits and fits, fair to the clients, with one prefill beside the decoders."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from tests.unit.server.session_world import Stream, World, rows


def opened(world: World, client: str, count: int, **settings: int) -> Stream:
    stream = Stream(world, client)
    for session in range(count):
        stream.open(session, **settings)
    stream.answers.clear()
    return stream


def batch(world: World) -> list[tuple[str, int, int]]:
    """Run one batch: client, session and number of tokens of what was in it."""
    found: list[tuple[str, int, int]] = []
    taken = world.sessions._batcher.take
    job, then = world.jobs.pop(0)

    def take():
        ready = taken()
        found.extend((one.session.client, one.session.key[1], one.num_tokens) for one in ready)
        return ready

    world.sessions._batcher.take = take  # type: ignore[method-assign]
    try:
        then(job())
    finally:
        world.sessions._batcher.take = taken  # type: ignore[method-assign]
    return found


def test_all_sessions_that_wait_are_one_batch_whenever_they_came():
    world = World()
    streams = [opened(world, client, 3) for client in ("a", "b")]
    for stream in streams:
        for session in range(3):
            stream.forward(session, 0, rows(2, session))
    assert len(batch(world)) == 6
    assert world.jobs == []


def test_messages_that_follow_each_other_run_in_order_one_a_batch():
    world = World()
    stream = opened(world, "a", 4)
    for number in range(3):
        for session in range(4):
            stream.forward(session, number, rows(1, number), number)
    assert [len(batch(world)) for _ in range(3)] == [4, 4, 4], "a batch is not begun with the first of those that wait"
    got = stream.outputs()
    for session in range(4):
        torch.testing.assert_close(got[session, 2], sum(rows(1, number) for number in range(3)))


def test_full_batch_takes_from_each_client_in_turn():
    world = World("a", "b", "c", batch_tokens=6)
    many = opened(world, "a", 12)
    few = [opened(world, client, 2) for client in ("b", "c")]
    for session in range(12):
        many.forward(session, 0, rows(1))
    for stream in few:
        for session in range(2):
            stream.forward(session, 0, rows(1))
    assert Counter(client for client, _, _ in batch(world)) == {"a": 2, "b": 2, "c": 2}
    assert Counter(client for client, _, _ in batch(world)) == {"a": 6}


def test_client_whose_message_did_not_fit_is_first_in_the_next_batch():
    world = World("a", "b", batch_tokens=8)
    streams = {client: opened(world, client, 2) for client in ("a", "b")}
    for stream in streams.values():
        for session in range(2):
            stream.forward(session, 0, rows(5))
    assert [[client for client, _, _ in batch(world)] for _ in range(4)] == [["a"], ["b"], ["a"], ["b"]]


def test_one_prefill_runs_beside_the_decoders():
    world = World()
    stream = opened(world, "a", 6, max_tokens=256)
    for session in range(3):
        stream.forward(session, 0, rows(100))
        stream.forward(3 + session, 0, rows(1))
    sizes = [sorted(tokens for _, _, tokens in batch(world)) for _ in range(3)]
    assert sizes == [[1, 1, 1, 100], [100], [100]]


def test_prefills_take_turns_between_clients():
    world = World("a", "b")
    streams = {client: opened(world, client, 3, max_tokens=256) for client in ("a", "b")}
    for stream in streams.values():
        for session in range(3):
            stream.forward(session, 0, rows(100))
    assert [batch(world)[0][0] for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]


def test_prefill_is_not_starved_by_decoders_that_fill_every_batch():
    world = World("a", "b", batch_tokens=8)
    decoders, prefill = opened(world, "a", 16), opened(world, "b", 1, max_tokens=64)
    for session in range(16):
        decoders.forward(session, 0, rows(1))
    prefill.forward(0, 0, rows(40))
    sizes = [tokens for _, _, tokens in batch(world)]
    assert sizes == [1, 1, 1, 1, 40]


def test_message_that_comes_while_a_batch_runs_is_in_the_next_one():
    world = World()
    stream = opened(world, "a", 2)
    stream.forward(0, 0, rows(1))
    deliver = world.start()
    stream.forward(1, 0, rows(1))
    stream.forward(0, 1, rows(1), 1)
    assert world.jobs == []
    deliver()
    assert sorted(session for _, session, _ in batch(world)) == [0, 1]


def test_sequences_of_a_session_and_drafts_are_small_whatever_their_sum():
    world = World()
    stream = opened(world, "a", 2, num_sequences=8)
    stream.forward(0, 0, rows(64), (0,) * 8, lengths=(8,) * 8)
    stream.forward(1, 0, rows(64), (0,) * 8, lengths=(8,) * 8)
    assert len(batch(world)) == 2


def test_sessions_that_are_about_to_come_back_are_waited_for(monkeypatch):
    monkeypatch.setattr("fedsea.server.batches.LONGEST_GATHERING_S", 30.0)
    world = World()
    stream = opened(world, "a", 2)
    for session in range(2):
        stream.forward(session, 0, rows(1, session))
    assert len(batch(world)) == 2
    batcher = world.sessions._batcher
    batcher._last_batch_s = 30.0
    for session in batcher._away:
        session.back_after_s = 1e-3
    stream.forward(0, 1, rows(1, 0), 1)
    found: list[tuple[str, int, int]] = []
    engine = threading.Thread(target=lambda: found.extend(batch(world)))
    engine.start()
    stream.forward(1, 1, rows(1, 1), 1)
    engine.join(timeout=20)
    assert sorted(number for _, number, _ in found) == [0, 1]


def test_sessions_that_take_longer_and_those_that_are_gone_are_not_waited_for(monkeypatch):
    world = World()
    stream = opened(world, "a", 3)
    for session in range(3):
        stream.forward(session, 0, rows(1, session))
    assert len(batch(world)) == 3
    batcher = world.sessions._batcher
    far, gone, _ = batcher._away
    far.back_after_s, gone.back_after_s = 60.0, 0.0
    gone.closed = True
    stream.forward(2, 1, rows(1, 2), 1)
    monkeypatch.setattr(batcher._news, "wait", lambda *_: pytest.fail("the engine waits"))
    assert [number for _, number, _ in batch(world)] == [2]
