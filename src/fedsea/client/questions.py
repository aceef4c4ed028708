"""What was asked of a trunk and is not answered yet; asked on one thread, answered on another."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from fedsea.client.patience import Patience
from fedsea.client.trunk import StepInterrupted
from fedsea.errors import FedseaError
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoded

Key = tuple[str, int, int, int]
"""Kind, step, attempt (-1 outside any step), micro-batch."""


class OpenQuestions:
    """Futures by key. Those of a step end with it; lasting ones are asked again after a lost connection.

    A server that a client comes back to opens the same step and attempt once more. So what a question belongs to is
    the very opening that the trainer works on, not the numbers in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[Key, Future[Any]] = {}
        self._lasting: dict[Key, Encoded] = {}
        self._newest: m.StepOpen | None = None
        self._taken: m.StepOpen | None = None
        self._error: FedseaError | None = None
        self._patience = Patience()  # with lasting ones; a step's may wait for other clients

    def add(self, key: Key, encoded: Encoded, *, lasting: bool) -> tuple[Future[Any], bool]:
        """Note a question.

        Returns:
            Its future, and whether it is to be sent: not if its step is over or the trunk is lost, which the future
            then says.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future, False
            if not lasting and not self._belongs(key):
                future.set_exception(StepInterrupted())
                return future, False
            self._pending[key] = future
            if lasting:
                self._lasting[key] = encoded
        return future, True

    def _belongs(self, key: Key) -> bool:
        opened = self._taken
        return opened is not None and opened is self._newest and key[1:3] == (opened.step, opened.attempt)

    def resolve(self, key: Key, value: Any) -> None:
        """An answer came; one that nobody waits for is dropped."""
        with self._lock:
            future = self._pending.pop(key, None)
            if self._lasting.pop(key, None) is not None:
                self._patience.renew()
        if future is not None:
            future.set_result(value)

    def take(self, opened: m.StepOpen) -> bool:
        """The trainer turns to a step; False if something newer has come: it is to leave it."""
        with self._lock:
            self._taken = opened
            return opened is self._newest

    def begin(self, opened: m.StepOpen | None) -> None:
        """A step was opened (None: none is any more): whatever was asked before will not be answered."""
        with self._lock:
            self._newest = opened
            given_up = [key for key in self._pending if key not in self._lasting]
            futures = [self._pending.pop(key) for key in given_up]
        for future in futures:
            future.set_exception(StepInterrupted())

    def lasting(self) -> list[Encoded]:
        """What is to be sent again on a new connection, as the very same bytes."""
        with self._lock:
            self._patience.renew()
            return list(self._lasting.values())

    def look(self, silence: FedseaError) -> None:
        """Taken every so often while the connection is there: lasting questions end if none was answered too long."""
        with self._lock:
            if not self._patience.look(waits=bool(self._lasting)):
                return
            futures = [self._pending.pop(key) for key in self._lasting if key in self._pending]
            self._lasting.clear()
        for future in futures:
            future.set_exception(silence)

    def fail(self, error: FedseaError) -> None:
        """The trunk is lost for good: every question, also a later one, ends with this error."""
        with self._lock:
            self._error = error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)
