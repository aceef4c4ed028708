"""Decoding sessions at a server, which survive a lost connection and a server that was started again.

A session keeps what it sent, as the very same bytes. When the stream is opened again it asks the server what it still
holds, sends again whatever was not answered, and rebuilds a cache that is gone; its caller only waits longer.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import torch

from fedsea.client.retry import RetryPolicy
from fedsea.client.trunk import Sealed
from fedsea.errors import CapacityError, FedseaError, ProtocolError, SessionLost, error_from_code
from fedsea.types import BlockRange
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_WINDOW = 16
"""Messages of one session that may be unanswered."""
_MOST_LOSSES = 8
"""A session that is lost so often without one answer in between is given up."""
_LONGEST_NUMBER = 1 << 14
"""Session numbers start again here: they are part of every message, and short."""


class Post(Protocol):
    """What sessions need of the stream; calls come from any thread."""

    def send(self, message: m.Message) -> None:
        """Queue a message; it is dropped if the stream breaks."""
        ...

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something after a while."""
        ...


class _Standing(Enum):
    ASKED = "asked"  # for the first time: messages follow at once
    AGAIN = "again"  # after a loss: messages wait for the answer
    WAITING = "waiting"  # for room at the server
    OPEN = "open"
    OVER = "over"


@dataclass(slots=True)
class _Sent:
    """One message of a session.

    Attributes:
        future: Whoever waits for the answer; None when it came.
    """

    number: int
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    sealed: Sealed
    future: Future[torch.Tensor] | None


class RemoteSession:
    """See `client.trunk.TrunkSession`. Made by `RemoteSessions.open`."""

    def __init__(self, owner: RemoteSessions, number: int, max_tokens: int, num_sequences: int) -> None:
        self.version = -1
        self.number = number
        self.max_tokens = max_tokens
        self.num_sequences = num_sequences
        self.num_replays = 0
        self._owner = owner
        self._standing = _Standing.ASKED
        self._history: list[_Sent] = []
        self._unsent: deque[_Sent] = deque()
        self._in_flight: dict[int, _Sent] = {}
        self._next = 0
        self._losses = 0
        self._rebuilding = False
        self._pauses: Iterator[float] | None = None
        self._error: FedseaError | None = None

    # --- from the caller's thread -----------------------------------------------------------------------------------

    def extend(
        self, hidden: Sealed, positions: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> Future[torch.Tensor]:
        """See `TrunkSession.extend`."""
        future: Future[torch.Tensor] = Future()
        with self._owner.lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            sent = _Sent(self._next, tuple(positions), tuple(lengths), tuple(sources), hidden, future)
            self._next += 1
            self._forget_behind(sent)
            self._history.append(sent)
            self._unsent.append(sent)
            self._pump()
        return future

    def close(self) -> None:
        """See `TrunkSession.close`."""
        with self._owner.lock:
            if self._standing is not _Standing.OVER:
                self._over(ProtocolError("This session was closed on this side."))
                self._owner.post.send(m.SessionClose(self.number))
        self._owner.settle()

    def _forget_behind(self, sent: _Sent) -> None:
        """Drop messages that a later one takes back entirely, so that a replay is no longer than the text."""
        if sent.sources:
            return
        while self._history:
            last = self._history[-1]
            starts = zip(last.positions, last.lengths, sent.positions, strict=True)
            if last.future is not None or last.sources or any(n and at < now for at, n, now in starts):
                return
            self._history.pop()

    # --- what the server says; under the owner's lock ---------------------------------------------------------------

    def ask(self) -> None:
        """Open the session, again if the stream is a new one."""
        if self._standing is _Standing.OVER:
            return
        if self._next or self.version >= 0:
            self._standing = _Standing.AGAIN
        opening = self._owner
        opening.post.send(
            m.SessionOpen(self.number, opening.owner, self.num_sequences, self.max_tokens, opening.blocks)
        )

    def opened(self, message: m.SessionOpened) -> None:
        """There is room; go on, or rebuild what was lost."""
        if self.version not in (-1, message.version) and self._history:
            self._over(
                SessionLost(
                    f"The trunk's adapters have changed since this answer began (step {self.version}, now "
                    f"{message.version}): begin the answer again."
                )
            )
            return
        self.version = message.version
        self._pauses = None
        first, self._standing = self._standing is _Standing.ASKED, _Standing.OPEN
        if first:
            return
        unanswered = [sent for sent in self._history if sent.future is not None]
        self._in_flight.clear()
        if not sum(message.held):
            if answered := len(self._history) - len(unanswered):
                self.num_replays += 1
                log.warning("The server lost a session's cache: %d messages are replayed.", answered)
            self._unsent = deque(self._history)
            self._rebuilding = True
        elif self._rebuilding or any(sent.sources for sent in unanswered):
            # Nobody knows how far the server has come with its caches: begin with empty ones.
            self._owner.post.send(m.SessionClose(self.number))
            self.ask()
            return
        else:
            self._unsent = deque(unanswered)
        self._pump()

    def answered(self, message: m.SessionOutput) -> None:
        """Hand an output to whoever waits for it."""
        sent = self._in_flight.pop(message.number, None)
        if sent is None:
            raise ProtocolError("The server answered a message of a session that was not sent.")
        self._losses = 0
        if self._rebuilding:
            rest = (*self._in_flight.values(), *self._unsent)
            self._rebuilding = any(other.future is None for other in rest)
        if sent.future is not None:
            output = message.tensors.get("") if isinstance(message.tensors, dict) else None
            if output is None or output.shape[0] != sent.sealed.num_rows:
                raise ProtocolError("The server's answer has another number of rows than were sent.")
            future, sent.future = sent.future, None
            self._merge()
            self._owner.deliver(future, output)
        self._pump()

    def failed(self, error: FedseaError) -> None:
        """Try again what can be tried again; else the session is over."""
        if isinstance(error, SessionLost):
            if self._standing is not _Standing.OPEN:
                return  # of messages that were sent before it was known
            self._losses += 1
            if self._losses <= _MOST_LOSSES:
                self.ask()
                return
        if isinstance(error, CapacityError) and self._standing in (_Standing.ASKED, _Standing.AGAIN):
            if self._pauses is None:
                self._pauses = self._owner.retry.pauses()
            pause = next(self._pauses, None)
            if pause is not None:
                self._standing = _Standing.WAITING
                self._owner.post.later(max(pause, error.retry_after_s), self._ask_again)
                return
        self._over(error)

    def _ask_again(self) -> None:
        with self._owner.lock:
            if self._standing is _Standing.WAITING:
                self._standing = _Standing.AGAIN
                self.ask()

    def _over(self, error: FedseaError) -> None:
        self._standing, self._error = _Standing.OVER, error
        waiting = [sent.future for sent in self._history if sent.future is not None]
        self._history.clear()
        self._unsent.clear()
        self._in_flight.clear()
        self._owner.drop(self)
        for future in waiting:
            self._owner.deliver(future, error)

    def over(self, error: FedseaError) -> None:
        """The stream is gone for good."""
        if self._standing is not _Standing.OVER:
            self._over(error)

    def _pump(self) -> None:
        if self._standing not in (_Standing.OPEN, _Standing.ASKED):
            return
        while self._unsent and len(self._in_flight) < _WINDOW:
            sent = self._unsent.popleft()
            self._in_flight[sent.number] = sent
            silent = sent.future is None
            self._owner.post.send(
                m.SessionForward(
                    self.number, sent.number, sent.positions, sent.lengths, sent.sources, silent, sent.sealed
                )
            )

    def _merge(self) -> None:
        """Join what was answered, for a shorter replay; only for one sequence, whose rows simply follow each other."""
        if self.num_sequences > 1 or len(self._history) < 2:
            return
        before, last = self._history[-2:]
        if before.future is not None or last.future is not None or before.number in self._in_flight:
            return
        kept = last.positions[0] - before.positions[0]
        if kept < 1 or kept + last.lengths[0] > self._owner.prefill_tokens:
            return
        sealed = before.sealed if kept == before.lengths[0] else before.sealed.head(kept)
        joined = replace(before, lengths=(kept + last.lengths[0],), sealed=sealed.followed_by(last.sealed))
        joined.number = last.number
        self._history[-2:] = [joined]


class RemoteSessions:
    """All sessions of one stream.

    Args:
        post: The stream.
        blocks: What the plan leaves to the trunk.
        prefill_tokens: The plan's bound of a message.
        retry: How long a server without room is asked again.
    """

    def __init__(self, post: Post, blocks: BlockRange, prefill_tokens: int, retry: RetryPolicy) -> None:
        self.post = post
        self.blocks = blocks
        self.prefill_tokens = prefill_tokens
        self.retry = retry
        self.owner = secrets.randbits(52)
        self.lock = threading.RLock()
        self._sessions: dict[int, RemoteSession] = {}
        self._lost: FedseaError | None = None
        self._next = 0
        self._due: deque[tuple[Future[torch.Tensor], Any]] = deque()

    def open(self, max_tokens: int, num_sequences: int) -> RemoteSession:
        """A new session; the server is asked at once."""
        with self.lock:
            while self._next in self._sessions:
                self._next = (self._next + 1) % _LONGEST_NUMBER
            session = RemoteSession(self, self._next, max_tokens, num_sequences)
            self._next = (self._next + 1) % _LONGEST_NUMBER
            self._sessions[session.number] = session
            if self._lost is None:
                session.ask()
            else:
                session.over(self._lost)
        return session

    def drop(self, session: RemoteSession) -> None:
        """Forget a session that is over."""
        self._sessions.pop(session.number, None)

    def connected(self) -> None:
        """The stream is a new one: every session is opened on it again."""
        with self.lock:
            for session in list(self._sessions.values()):
                session.ask()

    def receive(self, message: m.SessionOpened | m.SessionOutput | m.SessionFailed) -> None:
        """Take a message of the server.

        Raises:
            ProtocolError: It does not fit what was sent.
        """
        with self.lock:
            session = self._sessions.get(message.session)
            if session is None:
                return  # closed here in the meantime
            match message:
                case m.SessionOpened():
                    session.opened(message)
                case m.SessionOutput():
                    session.answered(message)
                case m.SessionFailed():
                    session.failed(_error_of(message))
        self.settle()

    def lost(self, error: FedseaError) -> None:
        """The stream will not come back."""
        with self.lock:
            self._lost = error
            for session in list(self._sessions.values()):
                session.over(error)
        self.settle()

    def deliver(self, future: Future[torch.Tensor], result: Any) -> None:
        """Note a result; `settle` hands it over when the lock is not held, for whoever waits may call back at once."""
        self._due.append((future, result))

    def settle(self) -> None:
        """Hand over what is due."""
        while self._due:
            future, result = self._due.popleft()
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)


def _error_of(message: m.SessionFailed) -> FedseaError:
    return error_from_code(message.code, message.message, message.retry_after_s)
