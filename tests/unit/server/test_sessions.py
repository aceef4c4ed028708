"""Sessions at the server: who gets one, whose it is, what ends it, and that its memory comes back."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest
import torch

from fedsea.errors import NonFiniteError
from fedsea.model.slabs import Slab
from fedsea.server import sessions
from fedsea.types import BlockRange, Reply
from fedsea.wire import messages as m
from tests.unit.server.session_world import SIZE, TOKEN_BYTES, Stream, World, rows


def refused(answer: m.Message, code: str, text: str) -> m.SessionFailed:
    assert isinstance(answer, m.SessionFailed), answer
    assert answer.code == code
    assert text in answer.message
    return answer


# --- admission --------------------------------------------------------------------------------------------------------


SLAB_BYTES = 16 * 32 * TOKEN_BYTES
"""Of sequences of up to 32 tokens; what one takes alone."""


def test_memory_is_counted_in_slabs_and_comes_back():
    world = World()
    stream = Stream(world, "a")
    opened = stream.open(max_tokens=33, num_sequences=3)
    assert isinstance(opened, m.SessionOpened)
    assert (opened.held, opened.version, opened.lease_s) == ((0, 0, 0), 0, 300.0)
    assert world.used == (6, 2 * SLAB_BYTES, 3)
    stream.send(m.SessionClose(0))
    stream.send(m.SessionClose(0))
    assert world.used == (0, 0, 0)


def test_full_memory_says_when_to_try_again_and_has_room_when_somebody_leaves():
    room = (1 << 20) // TOKEN_BYTES
    world = World("a", "b", kv_memory_mb=1, max_tokens=room)
    first, second = Stream(world, "a"), Stream(world, "b")
    first.open(max_tokens=room)
    answer = refused(second.open(max_tokens=32), "CAPACITY", "full at the moment")
    assert answer.retry_after_s > 0
    second.forward(0, 0, rows(1))  # sent at once, as clients do
    refused(second.answers[-1], "SESSION_LOST", "open it again")
    first.send(m.SessionClose(0))
    assert isinstance(second.open(max_tokens=32), m.SessionOpened)


def test_session_that_does_not_fit_leaves_nothing_of_itself():
    half = (1 << 19) // TOKEN_BYTES
    world = World("a", "b", kv_memory_mb=1, max_tokens=half)
    first, second = Stream(world, "a"), Stream(world, "b")
    first.open(max_tokens=half)
    before = world.used
    refused(second.open(max_tokens=half, num_sequences=2), "CAPACITY", "full at the moment")
    assert world.used == before
    assert world.decoder.trunk.arena.num_bytes == 1 << 19


def test_memory_that_was_made_is_within_the_bound_when_sessions_of_one_length_leave_room_to_those_of_another():
    world = World("a", "b", kv_memory_mb=1, max_sequences=4096)
    first, second = Stream(world, "a"), Stream(world, "b")
    sessions = 0
    while isinstance(first.open(sessions, max_tokens=64), m.SessionOpened):
        first.forward(sessions, 0, rows(1))
        sessions += 1
    first.send(m.SessionClose(sessions))
    world.run()
    slabs = {}
    for session in world.sessions._sessions.values():
        (cache,) = session.memory.caches
        slabs.setdefault(id(cache.slab), []).append(session)
    for members in slabs.values():
        for session in members[1:]:  # one stays in each, and with it all of its memory
            first.send(m.SessionClose(session.key[1]))
    assert world.used[1] == 1 << 20
    refused(second.open(max_tokens=128), "CAPACITY", "full at the moment")
    assert isinstance(second.open(max_tokens=32), m.SessionOpened)
    assert world.used[1] == 1 << 20


def test_session_that_can_never_fit_is_refused_for_good():
    world = World(kv_memory_mb=1, max_tokens=1 << 20, max_sequences=4)
    stream = Stream(world, "a")
    room = (1 << 20) // TOKEN_BYTES
    refused(stream.open(max_tokens=room + 1), "SESSION_TOO_LARGE", "need 2 MB for keys and values, and the server has ")
    refused(stream.open(max_tokens=(1 << 20) + 1), "PROTOCOL", "inference.max_tokens is")
    refused(stream.open(num_sequences=5), "PROTOCOL", "inference.max_sequences is")
    assert world.used == (0, 0, 0)


def test_session_whose_output_cannot_be_sent_ends_alone():
    world = World()
    stream, other = Stream(world, "a"), Stream(world, "b")
    for number in (0, 1):
        stream.open(number)
        stream.forward(number, 0, rows(2))
    other.open(0)
    world.run()
    stream.answers.clear()
    for owners, number in ((stream.owners, 0), (stream.owners, 0), (other.owners, 0)):  # the second: gone already
        world.sessions.fail("a", owners, number, NonFiniteError("beyond 65504"))
    (answer,) = stream.answers
    refused(answer, "NON_FINITE", "beyond 65504")
    assert answer.session == 0
    stream.answers.clear()
    stream.forward(1, 1, rows(1), 2)
    world.run()
    assert stream.outputs().keys() == {(1, 1)}
    assert world.used[2] == 2


def test_client_has_so_many_sequences_and_others_have_theirs():
    world = World("a", "b", max_sequences=4)
    stream = Stream(world, "a")
    stream.open(0, num_sequences=3)
    refused(stream.open(1, num_sequences=2), "CAPACITY", "inference.max_sequences")
    assert isinstance(stream.open(1, num_sequences=1), m.SessionOpened)
    assert isinstance(Stream(world, "b").open(num_sequences=4), m.SessionOpened)


def test_other_blocks_than_the_plans_are_refused():
    stream = Stream(World(), "a")
    stream.send(m.SessionOpen(0, 7, 1, 8, BlockRange(0, 4)))
    refused(stream.take(), "PROTOCOL", "other blocks than 1:4")


def test_server_that_is_not_ready_asks_for_patience_and_one_without_inference_does_not():
    stream = Stream(World(published=False), "a")
    assert refused(stream.open(), "CAPACITY", "not ready").retry_after_s < 1
    refused(Stream(World(enabled=False), "a").open(), "CONFIG", "inference.enabled = false")
    world = World()
    world.trunk.caches = False
    refused(Stream(world, "a").open(), "CONFIG", "cannot decode with a cache")


# --- what a session computes, and whose it is -------------------------------------------------------------------------


def test_output_is_that_of_the_sessions_own_past():
    world = World()
    streams = {name: Stream(world, name) for name in ("a", "b")}
    texts = {name: rows(6, seed) for seed, name in enumerate(streams)}
    for stream in streams.values():
        stream.open()
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        for name, stream in streams.items():
            stream.forward(0, start, texts[name][start:stop], start)
        world.run()
        for name, stream in streams.items():
            if start == 0:
                stream.take()
            expected = texts[name].cumsum(0)[start:stop]
            torch.testing.assert_close(stream.outputs(), {(0, start): expected})


def test_message_of_another_clients_session_is_lost_and_changes_nothing():
    world = World()
    own, foreign = Stream(world, "a"), Stream(world, "b")
    own.open(owner=7)
    own.take()
    foreign.owners[0] = 7  # whatever it says about itself: the name comes from its certificate
    foreign.forward(0, 0, rows(3, 1))
    foreign.send(m.SessionClose(0))
    refused(foreign.take(), "SESSION_LOST", "does not know")
    own.forward(0, 0, rows(2))
    world.run()
    torch.testing.assert_close(own.outputs(), {(0, 0): rows(2).cumsum(0)})


def test_same_number_of_another_process_of_a_client_is_another_session():
    world = World()
    streams = [Stream(world, "a"), Stream(world, "a")]
    for owner, stream in enumerate(streams):
        stream.open(owner=owner)
        stream.take()
        stream.forward(0, 0, rows(2, owner))
    world.run()
    for owner, stream in enumerate(streams):
        torch.testing.assert_close(stream.outputs(), {(0, 0): rows(2, owner).cumsum(0)})


def test_silent_messages_are_answered_without_a_tensor():
    world = World()
    stream = Stream(world, "a")
    stream.open()
    stream.take()
    stream.forward(0, 0, rows(3), silent=True)
    world.run()
    answer = stream.take()
    assert isinstance(answer, m.SessionOutput)
    assert answer.tensors.tensors == {}


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"number": 1, "rows": rows(1), "position": 5}, "PROTOCOL"),
        ({"number": 1, "rows": rows(2), "position": (2, 0), "lengths": (1, 1)}, "PROTOCOL"),
        ({"number": 1, "rows": rows(31), "position": 2}, "CAPACITY"),
        ({"number": 1, "rows": rows(3000), "position": 0}, "PROTOCOL"),
    ],
    ids=["out of order", "other sequences", "too long", "too large"],
)
def test_wrong_message_ends_its_session_alone_and_gives_the_memory_back(wrong, code):
    world = World()
    bad, good = Stream(world, "a"), Stream(world, "b")
    for stream in (good, bad):
        stream.open()
        stream.take()
        stream.forward(0, 0, rows(2))
        world.run()
        stream.outputs()
    before = world.used
    bad.forward(0, **{"position": 0, **wrong})
    bad.forward(0, 2, rows(1), 3)
    good.forward(0, 1, rows(1, 5), 2)
    world.run()
    codes = [answer.code for answer in bad.answers]
    assert codes[0] == code
    assert set(codes[1:]) <= {"SESSION_LOST"}
    torch.testing.assert_close(good.outputs(), {(0, 1): rows(2).sum(0) + rows(1, 5)})
    assert world.used == (before[0] - 1, before[1], 1)


@pytest.mark.parametrize(("num_sequences", "most"), [(1, 24), (2, 32)])
def test_message_has_as_many_tokens_as_a_prefill_or_some_for_each_of_its_own_sessions_sequences(num_sequences, most):
    world = World("a", prefill_tokens=24, max_sequences=64)
    stream = Stream(world, "a")
    stream.open(max_tokens=64, num_sequences=num_sequences)
    stream.take()
    for number, count in enumerate((most, most + 1)):
        others = (0,) * (num_sequences - 1)
        stream.forward(0, number, rows(count), (0, *others), lengths=(count, *others))
    refused(stream.take(), "PROTOCOL", f"{most} are allowed in this session")
    assert world.used == (0, 0, 0)
    stream.open(max_tokens=64, num_sequences=num_sequences)
    stream.take()
    stream.forward(0, 0, rows(most), (0, *others), lengths=(most, *others))
    world.run()
    assert stream.outputs().keys() == {(0, 0)}


def test_what_was_not_finite_does_not_reach_whoever_has_the_slot_next():
    world = World()
    bad = Stream(world, "a")
    bad.open()
    bad.take()
    bad.forward(0, 0, torch.full((3, SIZE), 3e38))
    world.run()
    refused(bad.take(), "NON_FINITE", "not finite")
    heir = Stream(world, "b")
    heir.open()
    cache = next(iter(world.sessions._sessions.values())).memory.caches[0]
    for memory in cache.slab._blocks[0] or ():
        assert torch.equal(memory[cache.slot], torch.zeros_like(memory[cache.slot]))


def test_failure_of_the_engine_is_one_sessions_and_others_of_its_batch_go_on(caplog):
    world = World()
    world.trunk.fails = lambda hidden: RuntimeError("no kernel") if hidden[0, 0] == 99 else None
    bad, good = Stream(world, "a"), Stream(world, "b")
    for stream, value in ((bad, torch.full((1, SIZE), 99.0)), (good, rows(1))):
        stream.open()
        stream.take()
        stream.forward(0, 0, value)
    world.run()
    refused(bad.take(), "FEDSEA", "logged why")
    torch.testing.assert_close(good.outputs(), {(0, 0): rows(1)})
    assert "99" not in caplog.text.replace("99.py", "")
    assert world.used[0] == 1


@pytest.mark.parametrize("at", ["taking over", "looking at outputs", "wiping", "handing over"])
def test_failure_anywhere_in_a_batch_is_one_sessions_and_leaves_no_page_of_it(at, monkeypatch, caplog):
    world = World()
    bad, good = Stream(world, "a"), Stream(world, "b")
    bad.open(num_sequences=2)
    good.open()
    (session,) = (one for one in world.sessions._sessions.values() if one.client == "a")
    slots = {cache.slot for cache in session.memory.caches}
    error = RuntimeError("no kernel")

    def raises_for_bad(slot: int, *_: object) -> None:
        if slot in slots:
            raise error

    if at == "taking over":
        monkeypatch.setattr(Slab, "take_over", lambda self, slot, *_: raises_for_bad(slot))
    elif at == "looking at outputs":
        monkeypatch.setattr(torch, "isfinite", mock.Mock(side_effect=error))
    elif at == "wiping":
        world.trunk.fails = lambda hidden: error if hidden[0, 0] == 99 else None
        monkeypatch.setattr(Slab, "wipe", lambda self, slot, *_: raises_for_bad(slot))
    else:
        monkeypatch.setattr(
            sessions,
            "Reply",
            lambda tensors: raises_for_bad(next(iter(slots))) if len(tensors[""]) == 2 else Reply(tensors),
        )
    value = {"wiping": 99.0, "looking at outputs": 3e38}.get(at, 1.0)
    for stream in (bad, good):
        stream.answers.clear()
    bad.forward(
        0, 0, torch.full((2, SIZE), value), (0, 0), lengths=(1, 1), sources=(0, 0) if at == "taking over" else ()
    )
    good.forward(0, 0, rows(1))
    world.run()
    refused(bad.take(), "FEDSEA", "logged why")
    torch.testing.assert_close(good.outputs(), {(0, 0): rows(1)})
    assert world.used == (1, SLAB_BYTES, 1)
    assert "no kernel" in caplog.text, "for the operator"
    good.forward(0, 1, rows(1, 1), 1)
    world.run()
    assert good.outputs().keys() == {(0, 1)}, "and the engine goes on"


def test_client_that_sends_without_end_loses_that_session():
    world = World()
    stream = Stream(world, "a")
    stream.open()
    stream.take()
    for number in range(70):
        stream.forward(0, number, rows(1))
    refused(stream.take(), "PROTOCOL", "Too many messages")
    world.run()
    assert world.used == (0, 0, 0)
    assert {answer.code for answer in stream.answers} == {"SESSION_LOST"}


async def a_turn():
    """Let whatever is ready on the event loop run."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_soon(over.set)
    await over.wait()


def test_client_is_not_read_from_while_many_of_its_tokens_wait_and_others_are():
    async def reads(world, client):
        reading = asyncio.ensure_future(world.sessions.room(client))
        await a_turn()
        return reading

    async def work():
        world = World("a", "b", prefill_tokens=16, max_sequences=1, max_tokens=64)
        most = 4 * 16
        streams = {client: Stream(world, client) for client in ("a", "b")}
        for stream in streams.values():
            stream.open(max_tokens=64)
        for number in range(4):
            assert (await reads(world, "a")).done()
            streams["a"].forward(0, number, rows(16), 16 * number)
        assert world.sessions._waiting_rows["a"] == most
        reading = await reads(world, "a")
        assert not reading.done()
        assert (await reads(world, "b")).done()
        world.start()()
        await asyncio.wait_for(reading, 5.0)
        world.run()
        assert world.sessions._waiting_rows["a"] == 0
        assert len(streams["a"].answers) == 5, "the opening's, and all four"

    asyncio.run(work())


@pytest.mark.parametrize("end", ["close", "reopen", "error", "at the engine"])
def test_client_is_read_from_again_when_what_waited_is_dropped(end):
    world = World("a", prefill_tokens=16, max_sequences=1, max_tokens=64)
    stream = Stream(world, "a")
    stream.open(max_tokens=64)
    for number in range(4):
        stream.forward(0, number, rows(16), 64 if end == "error" else 16 * number)
    assert world.sessions._is_full("a")
    if end == "reopen":
        stream.open(max_tokens=64)
    elif end == "close":
        stream.send(m.SessionClose(0))
    elif end == "at the engine":
        deliver = world.start()
        stream.send(m.SessionClose(0))
        assert world.sessions._waiting_rows["a"] == 16
        deliver()
    world.run()
    assert world.sessions._waiting_rows["a"] == 0


def test_lease_of_a_client_that_is_not_read_from_does_not_run():
    world = World("a", prefill_tokens=16, max_sequences=2, max_tokens=256, lease_s=10)
    stream = Stream(world, "a")
    stream.open(0, max_tokens=32)
    stream.open(1, max_tokens=256)
    for number in range(8):
        stream.forward(1, number, rows(16), 16 * number)
    world.now = 10.5
    world.sessions.tick()
    assert world.used[2] == 2
    world.run()
    world.now = 21.0
    world.sessions.tick()
    assert world.used[2] == 0


def test_lease_of_a_client_whose_answers_are_not_sent_yet_does_not_run():
    world = World("a", "b", lease_s=10)
    for client in ("a", "b"):
        Stream(world, client).open()
    world.now = 10.5
    with world.sessions.unread("a"):
        world.sessions.tick()
    assert world.used[2] == 1
    world.now = 21.0
    world.sessions.tick()
    assert world.used[2] == 0


# --- ends while the engine works --------------------------------------------------------------------------------------


def test_slot_is_not_given_away_while_the_engine_writes_to_it():
    world = World("a", "b", kv_memory_mb=1)
    stream = Stream(world, "a")
    stream.open()
    stream.take()
    stream.forward(0, 0, rows(2))
    deliver = world.start()
    stream.send(m.SessionClose(0))
    assert world.used == (1, SLAB_BYTES, 1), "what is not free is not counted as free"
    deliver()
    assert world.used == (0, 0, 0)
    assert stream.answers == []


def test_session_that_is_closed_before_its_batch_ran_never_runs():
    world = World()
    stream = Stream(world, "a")
    stream.open()
    stream.take()
    stream.forward(0, 0, rows(2))
    stream.send(m.SessionClose(0))
    assert world.used == (0, 0, 0)
    calls = world.trunk.num_calls
    world.run()
    assert world.trunk.num_calls == calls
    assert stream.answers == []


def test_session_without_a_message_ends_with_its_lease_and_one_at_work_does_not():
    world = World(lease_s=10)
    stream = Stream(world, "a")
    for session in (0, 1):
        stream.open(session)
        stream.take()
    stream.forward(1, 0, rows(2))
    deliver = world.start()
    world.now = 10.5
    world.sessions.tick()
    assert world.used[2] == 1
    deliver()
    torch.testing.assert_close(stream.outputs(), {(1, 0): rows(2).cumsum(0)})
    world.now = 20.0
    world.sessions.tick()
    assert world.used[2] == 1, "the answer has renewed the lease"
    world.now = 21.0
    world.sessions.tick()
    assert world.used == (0, 0, 0)
    stream.forward(1, 1, rows(1), 2)
    refused(stream.take(), "SESSION_LOST", "does not know")


def test_goodbye_ends_the_sessions_of_that_stream():
    world = World()
    leaving, staying = Stream(world, "a"), Stream(world, "a")
    leaving.open(0, owner=1)
    leaving.open(1, owner=1)
    staying.open(0, owner=2)
    world.sessions.leave(leaving.owners)
    assert world.used[2] == 1
    staying.forward(0, 0, rows(1))
    world.run()
    assert isinstance(staying.answers[-1], m.SessionOutput)


# --- a stream that broke ----------------------------------------------------------------------------------------------


def reopened(world: World, stream: Stream) -> tuple[Stream, m.SessionOpened]:
    """The same session on a new stream of its client."""
    new = Stream(world, stream.client)
    answer = new.open()
    assert isinstance(answer, m.SessionOpened)
    new.take()
    return new, answer


def test_reopened_session_still_has_its_past():
    world = World()
    old = Stream(world, "a")
    old.open()
    old.forward(0, 0, rows(3))
    world.run()
    new, opened = reopened(world, old)
    assert opened.held == (3,)
    assert world.used[2] == 1
    new.forward(0, 1, rows(1, 1), 3)
    world.run()
    torch.testing.assert_close(new.outputs(), {(0, 1): rows(3).sum(0) + rows(1, 1)})


def test_messages_that_come_late_on_the_old_stream_do_not_run_between_those_of_the_new_one():
    world = World()
    old = Stream(world, "a")
    old.open()
    old.forward(0, 0, rows(6))
    world.run()
    old.answers.clear()
    new, _ = reopened(world, old)
    # Number 1 goes back to token 2; number 2 follows it. Of the old stream's copies only the second one comes.
    old.forward(0, 2, rows(1, 2), 4)
    refused(old.take(), "SESSION_LOST", "does not know")
    old.send(m.SessionClose(0))
    new.forward(0, 1, rows(2, 1), 2)
    new.forward(0, 2, rows(1, 2), 4)
    world.run()
    got = new.outputs()
    past = rows(6)[:2].sum(0) + rows(2, 1).sum(0)
    assert got.keys() == {(0, 1), (0, 2)}
    torch.testing.assert_close(got[0, 2], past + rows(1, 2))


def test_output_of_a_message_of_the_old_stream_does_not_answer_one_of_the_new_stream():
    world = World()
    old = Stream(world, "a")
    old.open()
    old.take()
    old.forward(0, 0, rows(3))
    deliver = world.start()
    new, _ = reopened(world, old)
    new.forward(0, 0, rows(3))
    deliver()
    assert new.answers == [] == old.answers
    world.run()
    torch.testing.assert_close(new.outputs(), {(0, 0): rows(3).cumsum(0)})


def test_what_did_not_run_before_the_stream_broke_runs_once():
    world = World()
    old = Stream(world, "a")
    old.open()
    old.take()
    for number in range(3):
        old.forward(0, number, rows(1, number), number)
    new, opened = reopened(world, old)
    assert opened.held == (0,)
    for number in range(3):
        new.forward(0, number, rows(1, number), number)
    world.run()
    assert [answer.number for answer in new.answers] == [0, 1, 2]
    assert world.sessions.num_tokens == 3
    got = new.outputs()
    assert old.answers == []
    torch.testing.assert_close(got[0, 2], sum(rows(1, number) for number in range(3)))


def test_stream_that_broke_leaves_nothing_that_waits_or_is_answered_and_its_sessions_for_their_lease():
    world = World(lease_s=10)
    old, other = Stream(world, "a"), Stream(world, "a")
    for stream, owner in ((old, 7), (other, 8)):
        stream.open(owner=owner)
        stream.take()
        for number in range(3):
            stream.forward(0, number, rows(1, number), number)
    deliver = world.start()  # the first message of either
    world.now = 5.0
    world.sessions.broke(old.owners)
    assert world.sessions._waiting_rows["a"] == 4
    deliver()
    world.run()
    assert old.answers == []
    assert other.outputs().keys() == {(0, 0), (0, 1), (0, 2)}
    assert all(session.answer != old.answers.append for session in world.sessions._sessions.values())
    world.now = 14.0
    world.sessions.tick()
    new, opened = reopened(world, old)
    assert opened.held == (1,), "what the engine had, and no more"
    for number in range(3):
        new.forward(0, number, rows(1, number), number)
    world.run()
    torch.testing.assert_close(new.outputs()[0, 2], sum(rows(1, number) for number in range(3)))
    world.sessions.broke(new.owners)
    world.now += 10.5
    world.sessions.tick()
    assert world.used[2] == 0


def test_lease_begins_when_the_stream_breaks_though_what_waits_on_it_came_long_ago():
    world = World(lease_s=10)
    stream = Stream(world, "a")
    stream.open()
    stream.forward(0, 0, rows(1))
    world.now = 20.0
    world.sessions.broke(stream.owners)
    for world.now, left in ((29.5, 1), (30.5, 0)):
        world.sessions.tick()
        assert world.used[2] == left


def test_session_that_was_closed_while_its_stream_was_away_ends_on_the_next_one_and_no_other_does():
    world = World()
    old, foreign = Stream(world, "a"), Stream(world, "b")
    for session in (0, 1):
        old.open(session)
    old.forward(0, 0, rows(3))
    deliver = world.start()
    foreign.send(m.SessionClose(0, 7))
    new = Stream(world, "a")
    for owner in (0, 8):
        new.send(m.SessionClose(0, owner))
    assert world.used[::2] == (2, 2)
    for _ in range(2):
        new.send(m.SessionClose(0, 7))
    deliver()
    assert world.used[::2] == (1, 1)
    assert new.answers == []


def test_failure_of_a_message_of_the_old_stream_is_told_on_the_new_one():
    world = World()
    old = Stream(world, "a")
    old.open()
    old.forward(0, 0, rows(1), 3)
    deliver = world.start()
    new, _ = reopened(world, old)
    deliver()
    refused(new.take(), "PROTOCOL", "out of order")
    assert world.used == (0, 0, 0)


def test_session_is_not_opened_again_in_another_shape():
    world = World()
    stream = Stream(world, "a")
    stream.open(num_sequences=2)
    refused(stream.open(num_sequences=3), "PROTOCOL", "another shape")
    assert world.used[2] == 2


# --- versions ---------------------------------------------------------------------------------------------------------


def test_session_keeps_the_version_it_was_opened_with():
    world = World()
    stream = Stream(world, "a")
    stream.open(0)
    world.publish(5)
    stream.open(1)
    assert [answer.version for answer in stream.answers] == [0, 5]
    again = Stream(world, "a")
    assert again.open(0).version == 0
    assert again.open(1).version == 5


def test_status_counts_what_there_is():
    world = World()
    stream = Stream(world, "a")
    stream.open(0, num_sequences=2)
    stream.forward(0, 0, rows(3), (0, 0), lengths=(2, 1))
    world.run()
    status = world.sessions.status()
    assert {key: status[key] for key in ("sessions", "sequences", "tokens", "batches", "pages")} == {
        "sessions": 1,
        "sequences": 2,
        "tokens": 3,
        "batches": 1,
        "pages": 2,
    }
    assert status["kv_bytes"] <= status["kv_bytes_limit"]
