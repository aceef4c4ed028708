"""Who waits for room at the server: in which order, for how long, and what one client may keep from the others."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from fedsea.server.admission import _HOLDS_S, OWED_AFTER_S, OWED_IN_USE_AFTER_S, _Rank
from fedsea.server.line import _MOST_OF_A_CLIENT, BACK_WITHIN_S, HELD_S, RETRY_AFTER_S
from fedsea.wire import messages as m
from tests.unit.server.session_world import TOKEN_BYTES, Stream, World, rows

ROOM = (1 << 20) // TOKEN_BYTES
"""Tokens that the server has room for."""
QUARTER = ROOM // 4


def small_world(*names: str, **settings: int) -> World:
    return World(*names, kv_memory_mb=1, max_tokens=ROOM, **settings)


def ask(stream: Stream, session: int = 0, tokens: int = QUARTER, num_sequences: int = 1) -> m.Message | None:
    """Ask for a session; the answer, if it comes at once."""
    stream.answers.clear()
    stream.open_silently(session, max_tokens=tokens, num_sequences=num_sequences)
    return stream.answers[-1] if stream.answers else None


def wait(stream: Stream, session: int = 0, tokens: int = QUARTER, num_sequences: int = 1) -> None:
    """Stand in the line: refused once, and asked again."""
    assert is_refused(ask(stream, session, tokens, num_sequences))
    assert ask(stream, session, tokens, num_sequences) is None, "the answer waits for room"


def is_refused(answer: m.Message | None) -> bool:
    return isinstance(answer, m.SessionFailed) and answer.code == "CAPACITY" and 0 < answer.retry_after_s <= 1.0


def has(stream: Stream, session: int = 0) -> bool:
    """Whether a session was opened since the stream asked last."""
    return any(isinstance(answer, m.SessionOpened) and answer.session == session for answer in stream.answers)


def filled(world: World, client: str = "a") -> Stream:
    """A client that has everything, in four sessions."""
    stream = Stream(world, client)
    for session in range(4):
        assert isinstance(ask(stream, session), m.SessionOpened)
    return stream


def later(world: World, seconds: float) -> None:
    world.now += seconds
    world.sessions.tick()


# --- the line ---------------------------------------------------------------------------------------------------------


def test_room_goes_to_whoever_came_first_and_newcomers_stand_behind():
    world = small_world("a", "b", "c", "d")
    holder = filled(world)
    first, second, newcomer = (Stream(world, client) for client in "bcd")
    wait(first)
    wait(second)
    holder.send(m.SessionClose(0))
    assert (has(first), has(second)) == (True, False)
    wait(newcomer)
    for stream, session in ((second, 1), (newcomer, 2)):
        assert not has(stream)
        holder.send(m.SessionClose(session))
        assert has(stream)


def test_oldest_is_not_starved_by_those_who_need_less():
    world = small_world("a", "b", "c")
    holder = filled(world, "c")
    large, small = Stream(world, "a"), Stream(world, "b")
    wait(large, tokens=QUARTER)
    wait(small, tokens=32)
    world.sessions._admission._share_bytes = 1 << 20  # who comes first is the question here, not how much one may have
    holder.send(m.SessionClose(0))
    assert has(large)
    assert not has(small)


def test_first_opening_is_refused_at_once_and_the_next_one_waits_a_bounded_time_and_keeps_its_place():
    world = small_world("a", "b", "c")
    holder = filled(world)
    first, second = Stream(world, "b"), Stream(world, "c")
    wait(first)
    wait(second)
    for _ in range(5):
        later(world, HELD_S)
        assert is_refused(first.answers[-1])
        assert is_refused(second.answers[-1])
        later(world, RETRY_AFTER_S)
        assert ask(second) is None
        assert ask(first) is None
    holder.send(m.SessionClose(0))
    assert (has(first), has(second)) == (True, False)


def test_what_is_freed_is_kept_for_the_oldest_while_it_pauses():
    world = small_world("a", "b", "c")
    holder = filled(world)
    first, second = Stream(world, "b"), Stream(world, "c")
    assert is_refused(ask(first))
    holder.send(m.SessionClose(0))
    assert is_refused(ask(second))
    assert isinstance(ask(first), m.SessionOpened)


@pytest.mark.parametrize("way", ["closes", "says goodbye", "stream breaks", "falls silent", "asks for too much"])
def test_waiter_that_goes_away_does_not_block_those_behind_it(way):
    world = small_world("a", "b", "c")
    holder = filled(world)
    first, second = Stream(world, "b"), Stream(world, "c")
    wait(first)
    wait(second)
    if way == "closes":
        first.send(m.SessionClose(0))
    elif way == "says goodbye":
        world.sessions.leave(first.owners)
    elif way == "stream breaks":
        world.sessions.broke(first.owners)
    elif way == "asks for too much":
        assert ask(first, tokens=ROOM, num_sequences=2).code == "SESSION_TOO_LARGE"
    else:
        later(world, HELD_S)
        assert is_refused(first.answers[-1])
    holder.send(m.SessionClose(0))
    if way in ("stream breaks", "falls silent"):
        assert ask(second) is None, "it may be back"
        later(world, BACK_WITHIN_S)
        assert not has(first)
        ask(second)
    assert has(second)
    assert world.used[2] == 4
    assert world.sessions.status()["waiting"] == 0


def test_waiter_whose_stream_broke_has_its_place_on_the_next_one():
    world = small_world("a", "b", "c")
    holder = filled(world)
    old, second = Stream(world, "b"), Stream(world, "c")
    wait(old)
    wait(second)
    world.sessions.broke(old.owners)
    new = Stream(world, "b")
    assert ask(new) is None
    world.sessions.broke(old.owners)  # late: the waiter is not of that stream any more
    holder.send(m.SessionClose(0))
    assert (has(old), has(new), has(second)) == (False, True, False)
    new.forward(0, 0, rows(2))
    world.run()
    assert isinstance(new.answers[-1], m.SessionOutput)


def test_who_waits_for_sequences_of_its_own_client_keeps_no_other_client_waiting():
    world = small_world("a", "b", max_sequences=2)
    own, other = Stream(world, "a"), Stream(world, "b")
    assert isinstance(ask(own, 0, 32, 2), m.SessionOpened)
    assert "max_sequences" in ask(own, 1, 32).message
    assert ask(own, 1, 32) is None
    assert isinstance(ask(other, 0, 32), m.SessionOpened)
    own.answers.clear()
    own.send(m.SessionClose(0))
    assert has(own, 1)


def test_line_remembers_so_many_openings_of_a_client_and_others_have_theirs():
    world = small_world("a", "b", "c")
    filled(world)
    many = Stream(world, "b")
    for session in range(_MOST_OF_A_CLIENT + 10):
        assert is_refused(ask(many, session, 32))
    assert world.sessions.status()["waiting"] == _MOST_OF_A_CLIENT
    wait(Stream(world, "c"))


def test_opening_that_fails_ends_alone_and_is_not_charged(monkeypatch, caplog):
    world = small_world("a", "b", "c")
    holder = filled(world)
    bad, good = Stream(world, "b"), Stream(world, "c")
    wait(bad)
    wait(good)
    original = world.decoder.open
    errors = [RuntimeError("no kernel")]
    monkeypatch.setattr(world.decoder, "open", lambda *args: original(*args) if not errors else _raise(errors.pop()))
    holder.send(m.SessionClose(0))
    assert bad.answers[-1].code == "FEDSEA"
    assert has(good)
    assert world.used[2] == 4
    assert "no kernel" in caplog.text


def _raise(error: Exception) -> None:
    raise error


def never_there(world: World, client: str, session: int = 0) -> Stream:
    """Somebody asks for what is within a share of three, and more than a quarter, and does not wait for the answer."""
    stream = Stream(world, client)
    stream.open_silently(session, max_tokens=1024, num_sequences=10)
    assert not has(stream, session)
    return stream


def test_who_never_waits_for_an_answer_holds_nobody_up_however_many_sessions_it_asks_for():
    world = small_world("a", "b", "c")
    holder = Stream(world, "a")
    for session in range(3):
        assert isinstance(ask(holder, session), m.SessionOpened)
    for session in range(3):
        never_there(world, "c", session)
        later(world, 4.0)
        assert isinstance(ask(Stream(world, "b"), session, 32), m.SessionOpened)
        assert isinstance(ask(holder, 3 + session, 32), m.SessionOpened)


def test_who_was_there_and_pauses_as_it_was_told_is_not_passed_by_those_who_need_less():
    world = small_world("a", "b", "c")
    holder = Stream(world, "a")
    for session in range(3):
        assert isinstance(ask(holder, session), m.SessionOpened)
    stream = never_there(world, "c")
    stream.open_silently(0, max_tokens=1024, num_sequences=10)
    later(world, HELD_S)
    assert is_refused(stream.answers[-1])
    later(world, RETRY_AFTER_S)
    assert is_refused(ask(Stream(world, "b"), 0, 32))


def test_place_is_lost_when_somebody_is_away_for_much_longer_than_there_though_it_always_comes_back():
    world = small_world("a", "b", "c")
    filled(world)
    stream = Stream(world, "c")
    wait(stream)
    world.sessions.broke(stream.owners)
    later(world, BACK_WITHIN_S - 0.2)
    again = Stream(world, "c")
    assert ask(again) is None, "it has its place"
    world.sessions.broke(again.owners)
    later(world, 0.3)
    assert world.sessions.status()["waiting"] == 0


def test_who_asks_as_often_as_it_is_told_keeps_its_place_for_as_long_as_it_likes():
    world = small_world("a", "b")
    filled(world)
    stream = Stream(world, "b")
    wait(stream)
    world.sessions._admission._share_bytes = 1 << 20  # nobody has more than its own
    for _ in range(100):
        later(world, HELD_S)
        assert is_refused(stream.answers[-1])
        later(world, 1.0)
        assert ask(stream) is None


def test_large_session_is_not_overtaken_by_later_ones_of_its_own_client():
    world = small_world("a")
    client = filled(world)
    wait(client, 10, ROOM // 2)
    wait(client, 11, 32)
    client.send(m.SessionClose(0))
    for _ in owed(world, client, 4 * _HOLDS_S, 11, 32):
        client.open_silently(10, max_tokens=ROOM // 2)
    assert not has(client, 11)
    client.answers.clear()
    client.send(m.SessionClose(1))
    later(world, RETRY_AFTER_S)
    assert (has(client, 10), has(client, 11)) == (True, False)


def test_late_word_of_a_broken_stream_does_not_concern_a_waiter_on_the_next_one():
    world = small_world("a", "b")
    holder = filled(world)
    old, new = Stream(world, "b"), Stream(world, "b")
    wait(old)
    assert ask(new) is None
    old.send(m.SessionClose(0))
    holder.send(m.SessionClose(0))
    assert has(new)


def test_stream_keeps_nothing_of_openings_that_are_not_wanted_any_more():
    world = small_world("a", "b")
    filled(world)
    stream = Stream(world, "b")
    for session in range(5):
        ask(stream, session)
        stream.send(m.SessionClose(session, 7))
    ask(stream, 6)
    later(world, BACK_WITHIN_S)
    assert stream.owners == {}


def test_number_that_two_processes_use_on_one_stream_stays_that_of_the_last_one():
    world = small_world("a")
    stream = Stream(world, "a")
    stream.open(0, owner=7)
    stream.open(0, owner=8)
    stream.send(m.SessionClose(0, 7))
    stream.answers.clear()
    stream.forward(0, 0, rows(1))
    world.run()
    assert set(stream.outputs()) == {(0, 0)}


# --- shares -----------------------------------------------------------------------------------------------------------


def test_what_others_leave_idle_may_be_had_and_who_has_less_than_its_share_goes_first():
    world = small_world("a", "b")
    greedy, modest = filled(world), Stream(world, "b")
    wait(greedy, 4)
    wait(modest)
    greedy.send(m.SessionClose(0))
    assert (has(greedy, 4), has(modest)) == (False, True)
    wait(modest, 1)
    greedy.send(m.SessionClose(1))
    assert (has(greedy, 4), has(modest, 1)) == (False, True)
    wait(modest, 2)
    greedy.send(m.SessionClose(2))
    assert has(greedy, 4), "both have what is theirs now, or ask for more than that: the first comes first"
    greedy.send(m.SessionClose(4))
    assert has(modest, 2)


def test_who_has_nothing_goes_before_who_wants_more_also_where_sessions_are_larger_than_a_share():
    world = small_world(*"abcdefgh")
    greedy, poor = filled(world), Stream(world, "b")
    wait(greedy, 4)
    wait(poor)
    greedy.send(m.SessionClose(0))
    assert (has(greedy, 4), has(poor)) == (False, True)


def owed(world: World, stream: Stream, seconds: float, session: int = 0, tokens: int = QUARTER) -> Iterator[float]:
    """Time passes, some of it at a step, while a client asks; ends when it has its session."""
    until = world.now + seconds
    while world.now < until and not has(stream, session):
        later(world, RETRY_AFTER_S)
        if not has(stream, session):
            ask(stream, session, tokens)
        yield world.now


def test_idle_sessions_beyond_a_share_end_for_whoever_waits_for_its_own_and_no_others_do():
    world = small_world("a", "b")
    greedy, modest = filled(world), Stream(world, "b")
    pages = world.used[0]
    for session in (0, 1):
        for at in range(2):
            wait(modest, at) if at == session else None
        began = world.now
        for _ in owed(world, modest, 2 * OWED_AFTER_S, session):
            pass
        assert has(modest, session)
        assert world.now - began == pytest.approx(OWED_AFTER_S, abs=0.5)
    assert greedy.answers[1:] == [], "who does not wait for an answer is told when it goes on"
    assert [number for _, _, number in world.sessions._sessions] == [2, 3, 0, 1], "first what was not used for longest"
    wait(modest, 2)
    for _ in owed(world, modest, 2 * OWED_IN_USE_AFTER_S, 2):
        pass
    assert not has(modest, 2), "both have their share"
    assert world.used[0] == pages
    greedy.forward(0, 0, rows(1))
    assert greedy.answers[-1].code == "SESSION_LOST"


def test_slabs_that_a_clients_few_sequences_keep_are_part_of_what_it_has():
    world = World("a", "b", kv_memory_mb=1, max_sequences=4096)
    greedy, modest = Stream(world, "a"), Stream(world, "b")
    count = 0
    while not is_refused(ask(greedy, count, 32)):
        count += 1
    greedy.send(m.SessionClose(count))
    kept = {}
    for session in world.sessions._sessions.values():
        kept.setdefault(id(session.memory.caches[0].slab), session.key[1])
    for session in set(range(count)) - set(kept.values()):
        greedy.send(m.SessionClose(session))
    assert world.used[1:] == (1 << 20, len(kept)), "few sequences, and nothing left"
    wait(modest, tokens=64)
    for _ in owed(world, modest, 2 * OWED_AFTER_S, tokens=64):
        pass
    assert has(modest)
    assert world.used[1:] == (1 << 20, len(kept)), "one for one"


def test_sessions_in_use_beyond_a_share_end_only_after_long_and_are_told():
    world = small_world("a", "b")
    greedy, modest = filled(world), Stream(world, "b")
    wait(modest)
    began, lost = world.now, []
    for _ in owed(world, modest, 2 * OWED_IN_USE_AFTER_S):
        lost += [answer for answer in greedy.answers if isinstance(answer, m.SessionFailed)]
        world.run()
        greedy.answers.clear()
        for session in list(greedy.owners):
            greedy.forward(session, 0, rows(1))  # these wait while time passes
    assert has(modest)
    assert world.now - began == pytest.approx(OWED_IN_USE_AFTER_S, abs=0.5)
    assert [answer.code for answer in lost] == ["SESSION_LOST"]
    world.run()
    assert world.used[2] == 4


def test_session_at_the_engine_is_ended_once_and_its_room_is_free_when_it_has_run():
    world = small_world("a", "b")
    greedy, modest = filled(world), Stream(world, "b")
    for session in range(4):
        greedy.forward(session, 0, rows(1))
    deliver = world.start()
    wait(modest)
    world.sessions.tick()
    world.now += OWED_IN_USE_AFTER_S
    for _ in range(3):
        ask(modest)
        world.sessions.tick()
        assert not has(modest)
    deliver()
    assert has(modest)
    assert len(world.sessions._sessions) == 4


def test_only_session_of_a_client_does_not_end_for_one_that_is_larger_than_a_share():
    world = small_world("a", "b")
    single, large = Stream(world, "a"), Stream(world, "b")
    assert isinstance(ask(single, tokens=ROOM), m.SessionOpened)
    wait(large, tokens=ROOM)
    for _ in range(3):
        world.now += OWED_IN_USE_AFTER_S
        ask(large, tokens=ROOM)
        world.sessions.tick()
        world.sessions.tick()
    assert world.used[2] == 1
    assert not has(large)
    large.send(m.SessionClose(0))
    wait(large, tokens=QUARTER)
    world.sessions.tick()
    world.now += OWED_AFTER_S
    ask(large, tokens=QUARTER)
    world.sessions.tick()
    assert has(large), "but for what is within one it does"


def test_wish_that_cannot_be_met_ends_no_session_and_holds_others_up_for_a_while_only():
    world = small_world("a", "b", "c")
    page, greedy, vain = (Stream(world, client) for client in "abc")
    assert isinstance(ask(page, 0, 32), m.SessionOpened)
    for session in range(3):
        assert isinstance(ask(greedy, session), m.SessionOpened)
    wait(vain, tokens=ROOM)  # more than all others together would lend
    wait(greedy, 3, 32)
    began = world.now
    while not has(greedy, 3):
        later(world, RETRY_AFTER_S)
        for stream, session, tokens in ((vain, 0, ROOM), (greedy, 3, 32)):
            if not has(stream, session):
                ask(stream, session, tokens)
        assert world.now - began < 2 * _HOLDS_S
    assert world.now - began > _HOLDS_S / 2
    for _ in owed(world, vain, 4 * _HOLDS_S, tokens=ROOM):
        pass
    assert world.used[2] == 5
    assert len(world.sessions._sessions) == 5


def test_session_that_is_larger_than_a_share_is_passed_by_a_later_one_of_its_own_client_when_nothing_is_kept_for_it():
    world = small_world("a", "b")
    other, own = Stream(world, "a"), Stream(world, "b")
    assert isinstance(ask(other), m.SessionOpened)
    wait(own, 0, ROOM)
    wait(own, 1, 32)
    began, opened = world.now, []
    while not opened:
        assert world.now - began < 2 * _HOLDS_S
        later(world, RETRY_AFTER_S)
        opened += [answer.session for answer in own.answers if isinstance(answer, m.SessionOpened)]
        ask(own, 0, ROOM)
        opened += [answer.session for answer in own.answers if isinstance(answer, m.SessionOpened)]
        if not opened:
            ask(own, 1, 32)
    assert opened == [1]
    assert world.now - began > _HOLDS_S / 2


@pytest.mark.parametrize(("held", "wanted", "most"), [(512, 1024, 4), (256, 2048, 8), (256, 256, 1)])
def test_so_few_sessions_end_as_a_slab_has(held, wanted, most):
    world = small_world("a", "b", max_sequences=4096)
    greedy, modest = Stream(world, "a"), Stream(world, "b")
    count = ROOM // held
    for session in range(count):
        assert isinstance(ask(greedy, session, held), m.SessionOpened)
    order = list(range(count))
    random.Random(5).shuffle(order)
    for session in order:  # those of a slab are not those that were idle for longest
        world.now += 0.01
        greedy.forward(session, 0, rows(1))
        world.run()
    wait(modest, 0, wanted)
    for _ in owed(world, modest, 2 * OWED_AFTER_S, 0, wanted):
        pass
    assert has(modest)
    assert len(world.sessions._sessions) == count - most + 1


def test_sessions_with_several_sequences_end_with_what_else_they_free_and_no_other():
    world = small_world("a", "b", max_sequences=4096)
    greedy, modest = Stream(world, "a"), Stream(world, "b")
    for session in range(16):
        assert isinstance(ask(greedy, session, 512, 4), m.SessionOpened)
    wait(modest, 0, 1024, 7)
    for _ in range(40):
        later(world, RETRY_AFTER_S)
        if not has(modest):
            ask(modest, 0, 1024, 7)
    assert has(modest)
    assert len(world.sessions._sessions) == 16 - 4 + 1


def test_client_within_its_share_lends_nothing_though_a_slab_is_not_full():
    names = [f"c{number}" for number in range(32)]
    world = small_world(*names)
    streams = {name: Stream(world, name) for name in names}
    for name in names[:-1]:
        assert isinstance(ask(streams[name], tokens=ROOM // 32), m.SessionOpened)
    last = streams[names[-1]]
    wait(last, 0, ROOM // 64, 2)  # as much, in a slab of its own, for which the half of one that is left is too small
    for _ in range(150):
        later(world, RETRY_AFTER_S)
        assert not has(last)
        ask(last, 0, ROOM // 64, 2)
    streams[names[0]].send(m.SessionClose(0))
    later(world, RETRY_AFTER_S)
    assert has(last)


def test_time_for_which_a_client_waits_for_its_own_sessions_is_not_owed():
    world = small_world("a", "b", max_sequences=4)
    greedy, modest = filled(world, "b"), Stream(world, "a")
    greedy.send(m.SessionClose(3))
    for session in range(4):
        assert isinstance(ask(modest, session, 32), m.SessionOpened)
    assert "max_sequences" in ask(modest, 9).message
    for _ in owed(world, modest, 2 * OWED_IN_USE_AFTER_S, 9):
        pass
    modest.send(m.SessionClose(0, 7))  # now it waits for memory
    world.sessions.tick()
    assert not has(modest, 9)
    for _ in owed(world, modest, 2 * OWED_AFTER_S, 9):
        pass
    assert has(modest, 9)


def test_session_that_waits_to_come_back_for_longer_than_its_lease_still_has_its_adapters():
    world = small_world("a", "b", lease_s=10)
    greedy, modest = filled(world), Stream(world, "b")
    world.publish(5)
    wait(modest)
    for _ in owed(world, modest, 2 * OWED_AFTER_S):
        pass
    wait(greedy, 0)
    for _ in range(100):
        later(world, RETRY_AFTER_S)
        assert not has(greedy)
        ask(greedy)
        modest.forward(0, 0, rows(1))
        for session in (1, 2, 3):
            greedy.forward(session, 0, rows(1))
        world.run()
    greedy.answers.clear()
    modest.send(m.SessionClose(0))
    assert greedy.answers == [m.SessionOpened(0, (0,), 0, 10.0)]


def test_session_that_ended_for_others_comes_back_with_the_adapters_that_it_saw():
    world = small_world("a", "b", lease_s=60)
    greedy, modest = filled(world), Stream(world, "b")
    world.publish(5)
    for session in range(2):
        wait(modest, session)
        for _ in owed(world, modest, 2 * OWED_AFTER_S, session):
            pass
        assert has(modest, session)
    gone = sorted({0, 1, 2, 3} - {number for client, _, number in world.sessions._sessions if client == "a"})
    assert len(gone) == 2
    for session in range(2):
        modest.send(m.SessionClose(session))
    assert ask(greedy, gone[0]).version == 0
    greedy.send(m.SessionClose(gone[0], 7))
    assert ask(greedy, gone[0]).version == 5, "another one of the same number"
    later(world, 61.0)
    assert ask(greedy, gone[1]).version == 5, "it would have ended by now"


# --- everything at once -----------------------------------------------------------------------------------------------


class Caller:
    """One client's process at random: opens, says something, closes, breaks off, is killed."""

    def __init__(self, world: World, client: str, owner: int, draw: random.Random) -> None:
        self.world, self.draw, self.owner = world, draw, owner
        self.stream = Stream(world, client)
        self.shape: dict[int, tuple[int, int]] = {}
        self.open: set[int] = set()
        self.next = 0

    def act(self) -> None:
        draw = self.draw
        self.read()
        for session, (tokens, count) in list(self.shape.items()):
            if session not in self.open:
                self.stream.open_silently(session, max_tokens=tokens, num_sequences=count, owner=self.owner)
            elif draw.random() < 0.4:
                self.stream.forward(session, 0, rows(count), (0,) * count, lengths=(1,) * count)
            elif draw.random() < 0.3:
                self.close(session)
        if len(self.shape) < 3:
            self.shape[self.next] = draw.choice((32, 100, QUARTER, ROOM // 2)), draw.choice((1, 1, 2))
            self.next += 1
        if draw.random() < 0.05:
            self.break_off()
        if draw.random() < 0.03:  # a new process, which knows of nothing
            self.break_off()
            self.owner += 1
            self.shape.clear()

    def break_off(self) -> None:
        self.world.sessions.broke(self.stream.owners)
        self.stream = Stream(self.world, self.stream.client)
        self.open.clear()

    def close(self, session: int) -> None:
        del self.shape[session]
        self.open.discard(session)
        self.stream.send(m.SessionClose(session, self.owner))

    def read(self) -> None:
        for answer in self.stream.answers:
            if isinstance(answer, m.SessionOpened):
                self.open.add(answer.session)
            elif isinstance(answer, m.SessionFailed):
                self.open.discard(answer.session)
        self.stream.answers.clear()


class Watch:
    """How long openings wait that are first of those within their client's share."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.since: dict[tuple[str, int, int], float] = {}
        self.longest = 0.0

    def look(self) -> None:
        now = self.world.now
        admission = self.world.sessions._admission
        ranks = {w.key: rank for w, rank in admission._in_order()}
        within = {key for key, rank in ranks.items() if rank is _Rank.WITHIN}
        self.since = {key: self.since.get(key, now) for key in within}
        self.longest = max([self.longest, *(now - since for since in self.since.values())])


@pytest.mark.parametrize("seed", range(4))
def test_whatever_clients_do_nobody_starves_and_every_page_comes_back(seed):
    draw = random.Random(seed)
    world = small_world("a", "b", "c", lease_s=20, max_sequences=4)
    callers = [Caller(world, client, 1000 * number + 1, draw) for number, client in enumerate("abcabc")]
    watch, most_waiting = Watch(world), 0
    for _ in range(1500):
        draw.choice(callers).act()
        if draw.random() < 0.5:
            world.run()
        if draw.random() < 0.5:
            later(world, 0.2)
        assert world.used[1] <= 1 << 20
        most_waiting = max(most_waiting, world.sessions.status()["waiting"])
        watch.look()
    assert most_waiting > 5
    assert watch.longest < 4 * OWED_AFTER_S
    for caller in callers:
        for session in list(caller.shape):
            caller.close(session)
    world.run()
    later(world, 25.0)  # those of processes that are gone
    assert world.used == (0, 0, 0)
    assert world.sessions.status()["waiting"] == 0
