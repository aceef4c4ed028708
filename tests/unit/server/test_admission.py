"""Who waits for room at the server: in which order, for how long, and what one client may keep from the others."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from fedsea.server.admission import OWED_AFTER_S, OWED_IN_USE_AFTER_S, _Rank
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
    world.now += OWED_AFTER_S
    ask(large, tokens=QUARTER)
    world.sessions.tick()
    assert has(large), "but for what is within one it does"


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
        ranks = {w.key: admission._rank(w, admission._used_bytes(w.client)) for w in admission._in_order()}
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
