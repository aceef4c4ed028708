"""One decoding session at a server: what was sent, what is answered, and how it is brought back after a loss.

It keeps what it sent, as the very same bytes. When the server has lost the cache, or nobody can know how far it came,
everything is sent again in order; else only what was not answered. Its caller merely waits longer.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from fedsea.client.patience import Patience
from fedsea.client.trunk import Sealed
from fedsea.errors import CapacityError, FedseaError, ProtocolError, SessionLost
from fedsea.types import BlockRange
from fedsea.wire import messages as m

if TYPE_CHECKING:
    from fedsea.client.remote_sessions import RemoteSessions

log = logging.getLogger(__name__)

_WINDOW = 16
"""Messages of one session that may be unanswered."""
_MOST_LOSSES = 16
"""A session that is lost so often without one answer in between is given up."""


class _Standing(Enum):
    NEW = "new"  # the server has not been asked
    ASKED = "asked"  # for the first time: messages follow at once
    AGAIN = "again"  # after a loss: messages wait for the answer
    WAITING = "waiting"  # for room at the server
    OPEN = "open"
    OVER = "over"


@dataclass(slots=True)
class _Sent:
    """One message of a session.

    Attributes:
        parts: Its rows; several where messages were merged, whose rows then are joined when they are asked for.
        future: Whoever waits for the answer; None when it came.
    """

    number: int
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    parts: list[Sealed]
    future: Future[torch.Tensor] | None

    @property
    def sealed(self) -> Sealed:
        """All rows."""
        if len(self.parts) > 1:
            self.parts[:] = [self.parts[0].followed_by(*self.parts[1:])]
        return self.parts[0]


class RemoteSession:
    """See `client.trunk.TrunkSession`. Made by `RemoteSessions.open`."""

    def __init__(
        self, owner: RemoteSessions, number: int, max_tokens: int, num_sequences: int, blocks: BlockRange
    ) -> None:
        self.version = -1
        self.number = number
        self.max_tokens = max_tokens
        self.num_sequences = num_sequences
        self.blocks = blocks
        self.num_replays = 0
        self._owner = owner
        self._standing = _Standing.NEW
        self._history: list[_Sent] = []
        self._unsent: deque[_Sent] = deque()
        self._in_flight: dict[int, _Sent] = {}
        self._next = 0
        self._losses = 0
        self._rebuilding = False
        self._asked_at = 0.0
        self._waited_s = 0.0
        self._error: FedseaError | None = None
        self._patience = Patience()

    # --- from the caller's thread -----------------------------------------------------------------------------------

    def extend(
        self, hidden: Sealed, positions: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> Future[torch.Tensor]:
        """See `TrunkSession.extend`."""
        future: Future[torch.Tensor] = Future()
        future.set_running_or_notify_cancel()  # an answer that was cancelled could not be delivered
        with self._owner.lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            sent = _Sent(self._next, tuple(positions), tuple(lengths), tuple(sources), [hidden], future)
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
                self._leave(ProtocolError("This session was closed on this side."))
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

    # --- what the stream says; under the owner's lock ---------------------------------------------------------------

    def ask(self) -> None:
        """Open the session, again if the server was asked before."""
        owner = self._owner
        if self._standing is _Standing.OVER or not owner.online:
            return
        self._patience.renew()
        self._asked_at = owner.clock()
        self._standing = _Standing.ASKED if self._standing is _Standing.NEW else _Standing.AGAIN
        owner.post.send(m.SessionOpen(self.number, owner.owner, self.num_sequences, self.max_tokens, self.blocks))
        self._pump()

    def connected(self) -> None:
        """The stream is a new one."""
        unanswered = any(sent.future is not None for sent in self._history)
        if self._standing is not _Standing.NEW and unanswered and not self._may_lose():
            self._leave(SessionLost(f"The connection broke {_MOST_LOSSES} times without an answer; try again later."))
        self.ask()

    def _may_lose(self) -> bool:
        self._losses += 1
        return self._losses <= _MOST_LOSSES

    def opened(self, message: m.SessionOpened) -> None:
        """There is room; go on, or rebuild what was lost."""
        self._patience.renew()
        if self._standing not in (_Standing.ASKED, _Standing.AGAIN) or len(message.held) != self.num_sequences:
            self._leave(ProtocolError("The server opened a session that it was not asked for, or another one."))
            return
        if self.version not in (-1, message.version) and self._history:
            self._leave(
                SessionLost(
                    f"The trunk's adapters have changed since this answer began (step {self.version}, now "
                    f"{message.version}): begin the answer again."
                )
            )
            return
        self.version = message.version
        self._waited_s = 0.0
        first, self._standing = self._standing is _Standing.ASKED, _Standing.OPEN
        if not first:
            self._go_on(lost=not sum(message.held))

    def _go_on(self, *, lost: bool) -> None:
        unanswered = [sent for sent in self._history if sent.future is not None]
        self._in_flight.clear()
        if lost or self._rebuilding or not _repeatable(unanswered):
            # The first message begins at token 0 of every sequence: whatever the server still holds, it forgets.
            if answered := len(self._history) - len(unanswered):
                self.num_replays += 1
                log.warning("A session's cache is rebuilt at the server: %d messages are replayed.", answered)
            self._unsent, self._rebuilding = deque(self._history), answered > 0
        else:
            self._unsent = deque(unanswered)
        self._pump()

    def answered(self, message: m.SessionOutput) -> None:
        """Hand an output to whoever waits for it."""
        self._patience.renew()
        sent = self._in_flight.pop(message.number, None)
        if sent is None:
            self._leave(ProtocolError("The server answered a message of a session that was not sent."))
            return
        if self._rebuilding:
            rest = (*self._in_flight.values(), *self._unsent)
            self._rebuilding = any(other.future is None for other in rest)
        if sent.future is not None:
            output = message.tensors.get("") if isinstance(message.tensors, dict) else None
            if output is None or output.shape[0] != sent.sealed.num_rows:
                self._leave(ProtocolError("The server's answer has another number of rows than were sent."))
                return
            self._losses = 0  # not for a silent one: a server that dies at the same message is not asked for ever
            future, sent.future = sent.future, None
            self._merge()
            self._owner.deliver(future, output)
        self._pump()

    def look(self, silence: FedseaError, *, busy: bool) -> None:
        """Taken every so often while the stream is there: a server that owes an answer too long ends the session."""
        asked = self._standing in (_Standing.ASKED, _Standing.AGAIN, _Standing.OPEN)
        waits = asked and any(sent.future is not None for sent in self._history)
        if self._patience.look(waits=waits, busy=busy):
            self._leave(silence)

    def failed(self, error: FedseaError) -> None:
        """Try again what can be tried again; else the session is over."""
        if isinstance(error, SessionLost):
            if self._standing is not _Standing.OPEN:
                return  # of messages that were sent before it was known
            if self._may_lose():
                self.ask()
                return
        if isinstance(error, CapacityError) and self._standing in (_Standing.ASKED, _Standing.AGAIN):
            pause = self._pause(error.retry_after_s)
            if pause is not None:
                self._standing = _Standing.WAITING
                self._owner.post.later(pause, self._ask_again)
                return
            self._leave(error)  # it has a place in the server's line, which others wait behind
            return
        self.over(error)

    def _pause(self, at_least_s: float) -> float | None:
        """How long to wait before asking for room again, which keeps the place in the server's line; None: no more."""
        policy = self._owner.retry
        pause = max(policy.first_s, at_least_s) * (1 + policy.random.random() / 4)
        self._waited_s += self._owner.clock() - self._asked_at + pause
        return pause if self._waited_s <= policy.retry_for_s else None

    def _ask_again(self) -> None:
        with self._owner.lock:
            if self._standing is _Standing.WAITING:
                self.ask()

    def _leave(self, error: FedseaError) -> None:
        """End the session on this side, and tell the server so."""
        asked = self._standing is not _Standing.NEW
        self.over(error)
        if asked:
            self._owner.tell_closed(self.number)

    def over(self, error: FedseaError) -> None:
        """The server has ended the session, or the stream is gone for good."""
        if self._standing is _Standing.OVER:
            return
        self._standing, self._error = _Standing.OVER, error
        waiting = [sent.future for sent in self._history if sent.future is not None]
        self._history.clear()
        self._unsent.clear()
        self._in_flight.clear()
        self._owner.drop(self)
        for future in waiting:
            self._owner.deliver(future, error)

    def _pump(self) -> None:
        if self._standing not in (_Standing.OPEN, _Standing.ASKED) or not self._owner.online:
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
        if before.future is not None or last.future is not None:
            return
        kept = last.positions[0] - before.positions[0]
        if kept < 1 or kept + last.lengths[0] > self._owner.prefill_tokens:
            return
        lengths = (kept + last.lengths[0],)
        parts = _appended(before.parts, before.lengths[0] - kept, last.sealed)
        self._history[-2:] = [_Sent(last.number, before.positions, lengths, before.sources, parts, None)]


def _appended(parts: list[Sealed], num_taken_back: int, new: Sealed) -> list[Sealed]:
    """Rows without so many of the last ones, and new ones behind.

    A part is longer than the one behind it: so there are few, and a row is copied as often as the length is doubled.
    """
    while num_taken_back:
        last = parts.pop()
        if last.num_rows > num_taken_back:
            parts.append(last.head(last.num_rows - num_taken_back))
        num_taken_back -= min(last.num_rows, num_taken_back)
    while parts and parts[-1].num_rows <= new.num_rows:
        new = parts.pop().followed_by(new)
    return [*parts, new]


def _repeatable(unanswered: Sequence[_Sent]) -> bool:
    """Whether these may be sent again to a server that may have run some of them already.

    Each begins where its sequences stood at the time; a later one must not have gone back behind that, nor may
    sequences have changed places.
    """
    if any(sent.sources for sent in unanswered):
        return False
    pairs = itertools.pairwise(unanswered)
    return all(now >= at for one, then in pairs for at, now in zip(one.positions, then.positions, strict=True))
