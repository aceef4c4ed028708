"""Sessions of a client against a server whose every word, and every silence, the test chooses."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedsea.client.patience import LOOKS
from fedsea.client.remote_session import _MOST_LOSSES, _WINDOW
from fedsea.client.remote_sessions import _MOST_CLOSED_WAITING, RemoteSession, RemoteSessions
from fedsea.client.retry import RetryPolicy
from fedsea.errors import CapacityError, FedseaError, ProtocolError, SessionLost, TransportError
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoder

BLOCKS = BlockRange(1, 4)
MAX_SEQUENCES = 100
COPIED: list[int] = []
"""Rows that were copied, join by join."""


@dataclass(frozen=True)
class Rows:
    """Stands for sealed hidden states: one letter a row."""

    text: str

    @property
    def num_rows(self) -> int:
        return len(self.text)

    def head(self, num_rows: int) -> Rows:
        return Rows(self.text[:num_rows])

    def followed_by(self, *others: Rows) -> Rows:
        joined = Rows("".join(one.text for one in (self, *others)))
        COPIED.append(joined.num_rows)
        return joined


@dataclass
class Post:
    """The stream: what was sent on it, and calls that are due later."""

    sent: list[m.Message] = field(default_factory=list)
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def send(self, message: m.Message) -> None:
        self.sent.append(message)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.due.append((seconds, call))

    def ring(self) -> float:
        """The next call that is due; how long it had to wait."""
        seconds, call = self.due.pop(0)
        call()
        return seconds

    def take(self) -> list[m.Message]:
        taken, self.sent = self.sent, []
        return taken


class Bench:
    """A client's sessions, on a stream that is there."""

    def __init__(self, *, retry_for_s: float = 600.0, prefill_tokens: int = 8, online: bool = True) -> None:
        self.post = Post()
        self.now = 0.0
        self.sessions = RemoteSessions(
            self.post,
            BLOCKS,
            prefill_tokens,
            MAX_SEQUENCES,
            RetryPolicy(retry_for_s),
            online=online,
            clock=lambda: self.now,
        )

    def open(self, num_sequences: int = 1, *, answered: bool = True) -> RemoteSession:
        session = self.sessions.open(64, num_sequences)
        if answered:
            self.opened(session)
            self.post.take()
        return session

    def opened(self, session: RemoteSession, held: tuple[int, ...] = (), version: int = 0) -> None:
        held = held or (0,) * session.num_sequences
        self.sessions.receive(m.SessionOpened(session.number, held, version, 300.0))

    def failed(self, session: RemoteSession, error: FedseaError) -> None:
        after = getattr(error, "retry_after_s", 0.0)
        self.sessions.receive(m.SessionFailed(session.number, error.code, error.message, after))

    def answer(self, message: m.Message) -> None:
        """What the server says to a message: number of the message in every value."""
        assert isinstance(message, m.SessionForward)
        tensors = {} if message.silent else {"": torch.full((sum(message.lengths), 2), float(message.number))}
        self.sessions.receive(m.SessionOutput(message.session, message.number, tensors))

    def end_of(self, session: RemoteSession) -> m.SessionClose:
        return m.SessionClose(session.number, self.sessions.owner)

    def break_connection(self) -> None:
        self.sessions.disconnected()
        self.post.take()

    def reconnect(self) -> None:
        self.break_connection()
        self.sessions.connected()


def say(session: RemoteSession, text: str, at: int, sources: tuple[int, ...] = ()) -> Future[torch.Tensor]:
    return session.extend(Rows(text), (at,), (len(text),), sources)


def told(future: Future[torch.Tensor], number: int) -> bool:
    """Whether a message's own answer came to whoever waits for it."""
    return future.done() and bool((future.result(0) == number).all())


def texts(messages: list[m.Message]) -> list[tuple[str, int, bool]]:
    """Rows, position and silence of what was sent; everything else fails."""
    assert all(isinstance(one, m.SessionForward) for one in messages), messages
    return [(one.tensors.text, one.positions[0], one.silent) for one in messages]  # type: ignore[union-attr]


def kinds(messages: list[m.Message]) -> list[str]:
    return [type(one).__name__.removeprefix("Session") for one in messages]


# --- the usual way ----------------------------------------------------------------------------------------------------


def test_messages_follow_the_opening_at_once_and_no_more_than_a_window_of_them():
    bench = Bench()
    session = bench.open(answered=False)
    futures = [say(session, "x", at) for at in range(_WINDOW + 3)]
    sent = bench.post.take()
    assert kinds(sent) == ["Open"] + ["Forward"] * _WINDOW
    bench.opened(session)
    assert bench.post.take() == [], "nothing is sent twice"
    bench.answer(sent[1])
    assert told(futures[0], 0)
    assert texts(bench.post.take()) == [("x", _WINDOW, False)]
    assert not futures[1].done()


def test_session_that_is_opened_while_there_is_no_stream_waits_for_it():
    bench = Bench(online=False)
    session = bench.open(answered=False)
    future = say(session, "ab", 0)
    assert bench.post.take() == []
    bench.sessions.connected()
    sent = bench.post.take()
    assert kinds(sent) == ["Open", "Forward"]
    bench.opened(session)
    bench.answer(sent[1])
    assert told(future, 0)


def test_answers_are_handed_over_while_no_lock_is_held():
    bench = Bench()
    session = bench.open()
    later: list[Future[torch.Tensor]] = []
    say(session, "a", 0).add_done_callback(lambda _: later.append(say(session, "b", 1)))
    bench.answer(bench.post.take()[0])
    assert texts(bench.post.take()) == [("b", 1, False)]
    assert len(later) == 1


def test_caller_cannot_cancel_what_was_sent():
    bench = Bench()
    session = bench.open()
    future = say(session, "a", 0)
    assert not future.cancel()
    bench.answer(bench.post.take()[0])
    assert told(future, 0)


def test_closed_session_tells_the_server_and_whoever_waits():
    bench = Bench()
    session = bench.open()
    future = say(session, "a", 0)
    late = bench.post.take()[0]
    session.close()
    session.close()
    assert bench.post.take() == [bench.end_of(session)]
    with pytest.raises(ProtocolError, match="closed on this side"):
        future.result(0)
    bench.answer(late)  # an answer that crossed the goodbye
    with pytest.raises(ProtocolError, match="closed on this side"):
        say(session, "b", 1).result(0)


def test_end_of_a_session_is_told_when_the_stream_is_back_and_again_if_it_breaks_once_more():
    bench = Bench()
    session, heard, other = bench.open(), bench.open(), bench.open()
    heard.close()  # or not: the stream may have been broken already
    bench.break_connection()
    session.close()
    assert bench.post.take() == []
    for _ in range(2):
        bench.sessions.connected()
        sent = bench.post.take()
        assert sent[:-1] == [bench.end_of(heard), bench.end_of(session)]
        assert (kinds(sent[-1:]), sent[-1].session) == (["Open"], other.number)
        bench.break_connection()


def test_ends_that_are_told_again_are_as_many_as_can_be_open_and_few_more_and_their_numbers_not_used_again():
    bench = Bench()
    closed = [bench.open() for _ in range(MAX_SEQUENCES + _MOST_CLOSED_WAITING + 3)]
    for session in closed:
        session.close()
    bench.reconnect()
    assert bench.post.take() == [bench.end_of(session) for session in closed[3:]]
    bench.sessions._next = closed[0].number
    assert [bench.open().number for _ in range(4)] == [0, 1, 2, closed[-1].number + 1]


def test_number_of_a_session_is_not_used_again_while_it_is_open():
    bench = Bench()
    bench.sessions._next = (1 << 14) - 1
    numbers = [bench.open().number for _ in range(3)]
    bench.sessions._next = (1 << 14) - 1
    numbers.append(bench.open().number)
    assert numbers == [(1 << 14) - 1, 0, 1, 2]


# --- no room ----------------------------------------------------------------------------------------------------------


def test_session_without_room_is_asked_for_again_and_then_goes_on():
    bench = Bench()
    session = bench.open(answered=False)
    future = say(session, "ab", 0)
    for _ in range(2):
        bench.failed(session, CapacityError("full", 3.0))
        bench.failed(session, SessionLost("of the message that followed the opening"))
        bench.post.take()
        assert bench.post.ring() >= 3.0
        assert kinds(bench.post.take()) == ["Open"]
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("ab", 0, False)]
    bench.answer(sent[0])
    assert told(future, 0)


def test_session_without_room_for_too_long_says_so():
    bench = Bench(retry_for_s=30.0)
    session = bench.open(answered=False)
    future = say(session, "a", 0)
    waited_s = 0.0
    while not future.done():
        bench.failed(session, CapacityError("full", 1.0))
        if bench.post.due:
            waited_s += bench.post.ring()
    assert 10.0 < waited_s <= 30.0
    with pytest.raises(CapacityError, match="full"):
        future.result(0)


def test_place_in_the_servers_line_is_kept_by_asking_as_soon_as_the_server_says():
    bench = Bench()
    session = bench.open(answered=False)
    for _ in range(20):
        bench.failed(session, CapacityError("full", 0.5))
        assert 0.5 <= bench.post.ring() <= 0.625, "it does not become longer"


def test_time_for_which_the_server_lets_an_opening_wait_counts_and_the_server_is_told_of_the_end():
    bench = Bench(retry_for_s=30.0)
    session = bench.open(answered=False)
    future = say(session, "a", 0)
    for _ in range(14):
        bench.failed(session, CapacityError("full", 0.2))
        bench.post.ring()
        bench.post.take()
        bench.now += 2.0
    bench.failed(session, CapacityError("full", 0.2))
    assert isinstance(future.exception(0), CapacityError)
    assert bench.post.due == []
    assert bench.post.take() == [bench.end_of(session)], "others stand behind it"


def test_server_that_sends_one_away_for_a_day_is_not_waited_for():
    bench = Bench(retry_for_s=30.0)
    session = bench.open(answered=False)
    future = say(session, "a", 0)
    bench.failed(session, CapacityError("full", 86400.0))
    assert isinstance(future.exception(0), CapacityError)
    assert bench.post.due == []


def test_connection_that_breaks_while_a_session_waits_for_room_asks_once():
    bench = Bench()
    session = bench.open(answered=False)
    bench.failed(session, CapacityError("full", 1.0))
    bench.reconnect()
    assert kinds(bench.post.take()) == ["Open"]
    bench.post.ring()  # of before
    assert bench.post.take() == []
    future = say(session, "a", 0)
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("a", 0, False)]
    bench.answer(sent[0])
    assert told(future, 0)


def test_sequence_that_is_too_long_ends_its_open_session():
    bench = Bench()
    session = bench.open()
    future = say(session, "a", 0)
    bench.failed(session, CapacityError("opened for 64"))
    with pytest.raises(CapacityError, match="opened for 64"):
        future.result(0)
    assert bench.post.due == []


def test_refused_session_is_over_and_others_are_not():
    bench = Bench()
    bad, good = bench.open(answered=False), bench.open()
    future = say(bad, "a", 0)
    bench.failed(bad, ProtocolError("no such blocks"))
    with pytest.raises(ProtocolError, match="no such blocks"):
        future.result(0)
    fine = say(good, "a", 0)
    bench.answer(bench.post.take()[-1])
    assert told(fine, 0)


# --- a server that has forgotten --------------------------------------------------------------------------------------


def answered(bench: Bench, session: RemoteSession, *spoken: tuple[str, int]) -> None:
    for text, at in spoken:
        say(session, text, at)
        bench.answer(bench.post.take()[-1])


@dataclass
class Raw:
    """Bytes of each row that stands."""

    rows: list[bytes] = field(default_factory=list)

    def take(self, sealed: Any, at: int) -> None:
        assert at <= len(self.rows)
        pieces = [piece.reshape(sealed.num_rows, -1) for piece in sealed.pieces]
        self.rows[at:] = [b"".join(piece[row].tobytes() for piece in pieces) for row in range(sealed.num_rows)]


def test_lost_session_is_replayed_in_silence_and_goes_on():
    bench = Bench(prefill_tokens=4)
    session = bench.open()
    answered(bench, session, ("abcd", 0), ("e", 4), ("f", 5))
    futures = [say(session, "g", 6), say(session, "h", 7)]
    bench.post.take()
    for _ in futures:
        bench.failed(session, SessionLost("gone"))
    assert kinds(bench.post.take()) == ["Open"]
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("abcd", 0, True), ("ef", 4, True), ("g", 6, False), ("h", 7, False)]
    for message in sent:
        bench.answer(message)
    assert all(told(future, number) for future, number in zip(futures, (3, 4), strict=True))
    assert session.num_replays == 1


def test_message_that_comes_while_a_session_is_lost_waits_for_the_replay():
    bench = Bench()
    session = bench.open()
    answered(bench, session, ("ab", 0))
    first = say(session, "c", 2)
    bench.failed(session, SessionLost("gone"))
    bench.post.take()
    second = say(session, "d", 3)
    assert bench.post.take() == []
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("ab", 0, True), ("c", 2, False), ("d", 3, False)]
    for message in sent:
        bench.answer(message)
    assert told(first, 1)
    assert told(second, 2)


def test_what_is_kept_for_a_replay_is_not_copied_at_every_token():
    bench = Bench(prefill_tokens=1024)
    session = bench.open()
    COPIED.clear()
    answered(bench, session, *((chr(0x4E00 + at), at) for at in range(1024)))
    bench.failed(session, SessionLost("gone"))
    bench.opened(session)
    say(session, "!", 1024)
    sent = [one for one in bench.post.take() if isinstance(one, m.SessionForward)]
    assert texts(sent) == [("".join(chr(0x4E00 + at) for at in range(1024)), 0, True), ("!", 1024, False)]
    assert sum(COPIED) <= 1024 * 11, "a row is copied as often as the length is doubled"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_replay_is_the_very_same_bytes_as_were_sent(codec):
    bench = Bench(prefill_tokens=64)
    session = bench.open()
    encoder = Encoder("client", {Channel.HIDDEN: codec})
    sent, again = Raw(), Raw()
    rng = random.Random(5)
    at = 0
    for _ in range(60):
        num_new, at = rng.randint(1, 5), max(0, at - rng.choice((0, 0, 1, 3)))
        sealed = encoder.seal(Boundary("trusted-server").hidden(torch.randn(num_new, 3)))
        sent.take(sealed, at)
        session.extend(sealed, (at,), (num_new,))
        bench.answer(bench.post.take()[-1])
        at += num_new
    bench.failed(session, SessionLost("gone"))
    bench.opened(session)
    say(session, "!", at)
    *replayed, _ = [one for one in bench.post.take() if isinstance(one, m.SessionForward)]
    for message in replayed:
        again.take(message.tensors, message.positions[0])
    assert again.rows == sent.rows
    assert len(replayed) < 20


def test_replay_is_what_stands_and_not_what_was_taken_back():
    bench = Bench(prefill_tokens=16)
    session = bench.open()
    answered(bench, session, ("abcd", 0), ("efgh", 4), ("X", 6), ("Y", 3), ("Z", 3))
    bench.failed(session, SessionLost("gone"))
    bench.opened(session)
    future = say(session, "!", 4)
    sent = [one for one in bench.post.take() if isinstance(one, m.SessionForward)]
    line = ""
    for text, at, _ in texts(sent):
        line = line[:at] + text
    assert line == "abcZ!"
    assert texts(sent)[-1] == ("!", 4, False)
    for message in sent:
        bench.answer(message)
    assert told(future, 5)


def test_replay_of_several_sequences_is_what_was_sent_with_their_changes_of_place():
    bench = Bench()
    session = bench.open(2)
    for number, (text, positions, lengths, sources) in enumerate(
        [("abc", (0, 0), (2, 1), ()), ("de", (2, 1), (1, 1), (1, 0)), ("f", (3, 2), (1, 0), (0, 0))]
    ):
        future = session.extend(Rows(text), positions, lengths, sources)
        bench.answer(bench.post.take()[-1])
        assert told(future, number)
    future = session.extend(Rows("gh"), (4, 2), (1, 1))
    bench.post.take()
    bench.failed(session, SessionLost("gone"))
    bench.post.take()
    bench.opened(session)
    sent = bench.post.take()
    assert [(one.positions, one.lengths, one.sources, one.silent) for one in sent] == [
        ((0, 0), (2, 1), (), True),
        ((2, 1), (1, 1), (1, 0), True),
        ((3, 2), (1, 0), (0, 0), True),
        ((4, 2), (1, 1), (), False),
    ]


def test_session_that_is_lost_again_and_again_without_an_answer_is_given_up():
    bench = Bench()
    session = bench.open()
    answered(bench, session, ("ab", 0))
    future = say(session, "c", 2)
    for _ in range(_MOST_LOSSES):
        bench.failed(session, SessionLost("gone"))
        bench.post.take()
        bench.opened(session)
        bench.answer(bench.post.take()[0])  # a silent one: that is no progress
    assert not future.done()
    bench.failed(session, SessionLost("gone"))
    with pytest.raises(SessionLost):
        future.result(0)


def test_losses_with_answers_in_between_are_borne():
    bench = Bench()
    session = bench.open()
    for number in range(2 * _MOST_LOSSES):
        future = say(session, "x", number)
        bench.failed(session, SessionLost("gone"))
        bench.post.take()
        bench.opened(session)
        for message in bench.post.take():
            bench.answer(message)
        assert told(future, number)


def test_other_version_of_the_trunk_ends_an_answer_that_has_begun_and_no_other():
    bench = Bench()
    begun, fresh = bench.open(), bench.open()
    answered(bench, begun, ("ab", 0))
    future = say(begun, "c", 2)
    bench.reconnect()
    bench.post.take()
    for session in (begun, fresh):
        bench.opened(session, version=6)
    with pytest.raises(SessionLost, match=r"step 0, now 6"):
        future.result(0)
    assert bench.end_of(begun) in bench.post.take(), "else the server keeps its memory"
    assert fresh.version == 6
    assert not say(fresh, "a", 0).done()


# --- a connection that breaks -----------------------------------------------------------------------------------------


def test_after_a_break_only_what_was_not_answered_is_sent_again():
    bench = Bench()
    session = bench.open()
    answered(bench, session, ("abcd", 0))
    futures = [say(session, "e", 4), say(session, "f", 5)]
    bench.reconnect()
    assert kinds(bench.post.take()) == ["Open"]
    bench.opened(session, held=(5,))
    sent = bench.post.take()
    assert texts(sent) == [("e", 4, False), ("f", 5, False)]
    for message in sent:
        bench.answer(message)
    assert [told(future, 1 + number) for number, future in enumerate(futures)] == [True, True]
    assert session.num_replays == 0


def test_nothing_is_sent_between_two_connections():
    bench = Bench()
    session = bench.open()
    bench.break_connection()
    future = say(session, "a", 0)
    other = bench.sessions.open(64, 1)
    closed = bench.sessions.open(64, 1)
    closed.close()
    assert bench.post.take() == []
    bench.sessions.connected()
    sent = bench.post.take()
    assert [(type(one), one.session) for one in sent] == [
        (m.SessionOpen, session.number),
        (m.SessionOpen, other.number),
    ]
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("a", 0, False)]
    bench.answer(sent[0])
    assert told(future, 0)


def test_break_before_the_opening_was_answered_sends_the_first_message_once():
    bench = Bench()
    session = bench.open(answered=False)
    future = say(session, "ab", 0)
    bench.reconnect()
    assert kinds(bench.post.take()) == ["Open"]
    bench.opened(session)
    sent = bench.post.take()
    assert texts(sent) == [("ab", 0, False)]
    bench.answer(sent[0])
    assert told(future, 0)


def test_break_during_a_replay_begins_it_again_in_the_session_that_is_there():
    bench = Bench(prefill_tokens=2)
    session = bench.open()
    answered(bench, session, ("ab", 0), ("cd", 2), ("ef", 4))
    future = say(session, "g", 6)
    bench.reconnect()
    bench.post.take()
    bench.opened(session)
    sent = bench.post.take()
    assert [silent for _, _, silent in texts(sent)] == [True, True, True, False]
    bench.answer(sent[0])
    bench.reconnect()
    bench.post.take()
    bench.opened(session, held=(4,))
    sent = bench.post.take()
    assert texts(sent) == [("ab", 0, True), ("cd", 2, True), ("ef", 4, True), ("g", 6, False)]
    for message in sent:
        bench.answer(message)
    assert told(future, 3)
    assert session.num_replays == 2


def test_change_of_places_that_may_have_happened_already_is_sent_again_with_all_that_was_before_it():
    bench = Bench()
    session = bench.open(2)
    session.extend(Rows("ab"), (0, 0), (1, 1))
    bench.answer(bench.post.take()[0])
    future = session.extend(Rows("cd"), (1, 1), (1, 1), (1, 0))
    bench.reconnect()
    bench.post.take()
    bench.opened(session, held=(2, 2))
    sent = bench.post.take()
    assert [(one.positions, one.sources, one.silent) for one in sent] == [
        ((0, 0), (), True),
        ((1, 1), (1, 0), False),
    ]
    for message in sent:
        bench.answer(message)
    assert told(future, 1)
    assert session.num_replays == 1


def test_messages_of_which_a_later_one_went_back_behind_an_earlier_one_are_sent_again_from_the_first_token_on():
    bench = Bench()
    session = bench.open()
    answered(bench, session, ("abcdef", 0))
    futures = [say(session, "gh", 6), say(session, "X", 2)]
    bench.reconnect()
    bench.post.take()
    bench.opened(session, held=(3,))  # both have run, and their answers are lost
    sent = bench.post.take()
    assert texts(sent) == [("abcdef", 0, True), ("gh", 6, False), ("X", 2, False)]
    for message in sent:
        bench.answer(message)
    assert [told(future, 1 + number) for number, future in enumerate(futures)] == [True, True]


def test_connection_that_breaks_for_ever_ends_whoever_waits_and_only_them():
    bench = Bench()
    waits, idle = bench.open(), bench.open()
    future = say(waits, "a", 0)
    for _ in range(_MOST_LOSSES + 1):
        assert not future.done()
        bench.reconnect()
    with pytest.raises(SessionLost, match="broke"):
        future.result(0)
    assert bench.end_of(waits) in bench.post.take()
    bench.opened(idle)
    assert not say(idle, "a", 0).done()


def test_stream_that_is_gone_for_good_ends_all_sessions_also_later_ones():
    bench = Bench()
    futures = [say(bench.open(), "a", 0) for _ in range(2)]
    bench.sessions.lost(TransportError("gave up"))
    futures.append(say(bench.sessions.open(64, 1), "a", 0))
    for future in futures:
        with pytest.raises(TransportError, match="gave up"):
            future.result(0)


# --- a server that errs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        m.SessionOutput(0, 0, {"": torch.zeros(3, 2)}),
        m.SessionOutput(0, 0, {}),
        m.SessionOutput(0, 5, {"": torch.zeros(2, 2)}),
        m.SessionOpened(0, (0,), 0, 300.0),
    ],
    ids=["other number of rows", "no rows", "number that was not sent", "opened again"],
)
def test_wrong_answer_ends_its_session_alone(answer):
    bench = Bench()
    bad, good = bench.open(), bench.open()
    assert bad.number == answer.session
    future, fine = say(bad, "ab", 0), say(good, "cd", 0)
    sent = bench.post.take()
    bench.sessions.receive(answer)
    with pytest.raises(ProtocolError, match="The server"):
        future.result(0)
    assert bench.post.take() == [bench.end_of(bad)]
    bench.answer(sent[1])
    assert told(fine, 0)


def test_answer_that_came_already_is_not_taken_for_another_ones():
    bench = Bench()
    session = bench.open()
    first, second = say(session, "a", 0), say(session, "b", 1)
    sent = bench.post.take()
    bench.answer(sent[0])
    bench.answer(sent[0])
    assert told(first, 0)
    with pytest.raises(ProtocolError):
        second.result(0)


def test_opening_with_another_number_of_sequences_ends_the_session():
    bench = Bench()
    session = bench.open(2, answered=False)
    future = session.extend(Rows("ab"), (0, 0), (1, 1))
    bench.opened(session, held=(0,))
    assert isinstance(future.exception(0), ProtocolError)


def test_error_of_the_engine_ends_its_session_with_the_servers_words():
    bench = Bench()
    session = bench.open()
    futures = [say(session, "a", 0), say(session, "b", 1)]
    bench.failed(session, FedseaError("logged why"))
    bench.failed(session, SessionLost("of the second message"))
    for future in futures:
        with pytest.raises(FedseaError, match="logged why"):
            future.result(0)


SILENCE = TransportError("The server says nothing.")


def look(bench: Bench, times: int = LOOKS) -> None:
    for _ in range(times):
        bench.sessions.look(SILENCE)


def test_server_that_owes_an_answer_too_long_ends_the_session_and_is_told():
    bench = Bench()
    session, other = bench.open(), bench.open()
    future = say(session, "ab", 0)
    bench.post.take()
    look(bench)
    assert not future.done()
    look(bench, 1)
    assert future.exception(0) is SILENCE
    assert bench.post.take() == [bench.end_of(session)]
    assert not say(other, "a", 0).done()


def test_patience_begins_anew_with_every_answer_and_every_connection():
    bench = Bench()
    session = bench.open()
    first, second = say(session, "a", 0), say(session, "b", 1)
    look(bench)
    bench.answer(bench.post.take()[0])
    assert told(first, 0)
    look(bench)
    bench.reconnect()
    look(bench)
    bench.opened(session, (1,))
    look(bench)
    assert not second.done()


def test_who_waits_for_room_or_for_nothing_is_not_owed_an_answer():
    bench = Bench()
    idle, full = bench.open(), bench.open(answered=False)
    future = say(full, "a", 0)
    bench.failed(full, CapacityError("No room.", 5.0))
    look(bench, 3 * LOOKS)
    assert not future.done()
    assert not say(idle, "a", 0).done()


def test_server_that_is_busy_with_other_sessions_is_given_longer_and_not_for_ever():
    bench = Bench()
    other, session = bench.open(), bench.open()
    future = say(session, "ab", 0)
    bench.post.take()
    for at in range(10 * LOOKS + 2):
        assert future.done() is (at == 10 * LOOKS + 1)
        say(other, "a", at)
        bench.answer(bench.post.take()[-1])
        look(bench, 1)
    assert future.exception(0) is SILENCE
