"""Decoding sessions at a server, which survive a lost connection and a server that was started again."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from fedsea.client.remote_session import RemoteSession
from fedsea.client.retry import RetryPolicy
from fedsea.errors import FedseaError, error_from_code
from fedsea.types import BlockRange
from fedsea.wire import messages as m

__all__ = ["Post", "RemoteSession", "RemoteSessions"]

_MOST_CLOSED_WAITING = 64
"""So many ends of sessions are told again on a new stream, besides as many as can be open: the old one may have been
broken when they were. Those that only wait at the server are forgotten there soon anyway."""
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


class RemoteSessions:
    """All sessions of one stream.

    Args:
        post: The stream.
        blocks: What the plan leaves to the trunk.
        prefill_tokens: The plan's bound of a message.
        max_sequences: The plan's bound of what is open.
        retry: How long a server without room is asked again.
        online: Whether the stream is there already.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        post: Post,
        blocks: BlockRange,
        prefill_tokens: int,
        max_sequences: int,
        retry: RetryPolicy,
        *,
        online: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.post = post
        self.blocks = blocks
        self.prefill_tokens = prefill_tokens
        self.retry = retry
        self.clock = clock
        self.owner = 1 + secrets.randbits(52)
        self.online = online
        self.lock = threading.RLock()
        self._sessions: dict[int, RemoteSession] = {}
        self._lost: FedseaError | None = None
        self._closed: deque[int] = deque(maxlen=max_sequences + _MOST_CLOSED_WAITING)
        self._next = 0
        self._answered = False  # any session, since the last look
        self._due: deque[tuple[Future[torch.Tensor], Any]] = deque()

    def open(self, max_tokens: int, num_sequences: int) -> RemoteSession:
        """A new session; the server is asked at once."""
        with self.lock:
            while self._next in self._sessions or self._next in self._closed:
                self._next = (self._next + 1) % _LONGEST_NUMBER
            session = RemoteSession(self, self._next, max_tokens, num_sequences, self.blocks)
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

    def tell_closed(self, number: int) -> None:
        """A session is over on this side; under the lock."""
        self._closed.append(number)
        if self.online:
            self.post.send(m.SessionClose(number, self.owner))

    def connected(self) -> None:
        """The stream is a new one: every session is opened on it again."""
        with self.lock:
            self.online = True
            for number in self._closed:
                self.post.send(m.SessionClose(number, self.owner))
            for session in list(self._sessions.values()):
                session.connected()
        self.settle()

    def disconnected(self) -> None:
        """The stream broke: nothing is sent until `connected`, so that each session is opened before its messages."""
        with self.lock:
            self.online = False

    def receive(self, message: m.SessionOpened | m.SessionOutput | m.SessionFailed) -> None:
        """Take a message of the server; one that does not fit what was sent ends its session."""
        with self.lock:
            session = self._sessions.get(message.session)
            if session is None:
                return  # closed here in the meantime
            match message:
                case m.SessionOpened():
                    session.opened(message)
                case m.SessionOutput():
                    self._answered = True
                    session.answered(message)
                case m.SessionFailed():
                    session.failed(_error_of(message))
        self.settle()

    def look(self, silence: FedseaError) -> None:
        """See `RemoteSession.look`."""
        with self.lock:
            busy, self._answered = self._answered, False
            for session in list(self._sessions.values()):
                session.look(silence, busy=busy)
        self.settle()

    def lost(self, error: FedseaError) -> None:
        """The stream will not come back."""
        with self.lock:
            self._lost, self.online = error, False
            for session in list(self._sessions.values()):
                session.over(error)
        self.settle()

    def deliver(self, future: Future[torch.Tensor], result: Any) -> None:
        """Note a result; `settle` hands it over when the lock is not held, for whoever waits may call back at once."""
        self._due.append((future, result))

    def settle(self) -> None:
        """Hand over what is due; several threads may do so at once."""
        while True:
            try:
                future, result = self._due.popleft()
            except IndexError:
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)


def _error_of(message: m.SessionFailed) -> FedseaError:
    return error_from_code(message.code, message.message, message.retry_after_s)
