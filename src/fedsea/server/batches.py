"""Which messages of which decoding sessions run next, as one batch; fair to the clients."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fedsea.errors import FedseaError
from fedsea.model.decoding import Memory, TrunkDecoder, Turn, reason_of
from fedsea.wire import messages as m

Answer = Callable[[m.Message], None]
Owners = dict[int, int]
"""Of one stream: session number to the owner that opened it. The very object also tells streams apart."""

SMALL_TURN = 16
"""A message with more new tokens per sequence is a prefill: one of those runs in a batch, beside small ones."""
_MOST_IN_BATCH = 1024
LONGEST_GATHERING_S = 0.02
"""Sessions that are about to come back are waited for at most so long."""


@dataclass(slots=True, eq=False)
class Session:
    """One session.

    Attributes:
        client: Whose; from the certificate.
        key: Its process's number and its own.
        owners: The stream on which it was opened last; messages of others are not taken.
        answer: Queues a reply on that stream.
        waiting: Messages of that stream that have not run yet, in order.
        running: Whether one of its messages is in the batcher or at the engine.
        answered_at: When its last batch ended.
        back_after_s: So long it usually takes from there to its next message.
    """

    client: str
    key: tuple[int, int]
    memory: Memory
    version: int
    owners: Owners
    answer: Answer
    last_used: float
    waiting: deque[m.SessionForward] = field(default_factory=deque)
    running: bool = False
    closed: bool = False
    answered_at: float = 0.0
    back_after_s: float = 1.0

    def idle_s(self, now: float) -> float:
        """Seconds without anything to do."""
        return 0.0 if self.running or self.waiting else now - self.last_used


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A message that may run.

    Attributes:
        owners: The stream that it came on.
    """

    session: Session
    message: m.SessionForward
    owners: Owners

    @property
    def num_tokens(self) -> int:
        """New tokens of all its sequences."""
        return sum(self.message.lengths)


Queues = dict[str, deque[Ready]]
"""By client; in the order in which clients have their turn."""


class Batcher:
    """Messages that may run, one of a session; the engine thread takes a batch of them when it is free.

    Args:
        decoder: Runs the batches.
        batch_tokens: Most new tokens of a batch, unless a single message has more.
        clock: Monotonic seconds.
    """

    def __init__(
        self, decoder: TrunkDecoder, batch_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._decoder = decoder
        self._batch_tokens = batch_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._away: dict[Session, None] = {}
        self._last_batch_s = 0.0
        self._small: Queues = {}
        self._large: Queues = {}

    def add(self, session: Session, message: m.SessionForward) -> None:
        """A message may run; the session's next one when this one has."""
        ready = Ready(session, message, session.owners)
        small = ready.num_tokens <= SMALL_TURN * len(message.lengths)
        with self._lock:
            (self._small if small else self._large).setdefault(session.client, deque()).append(ready)
            if session in self._away:
                del self._away[session]
                session.back_after_s += (self._clock() - session.answered_at - session.back_after_s) / 2
            self._news.notify()

    def discard(self, session: Session) -> Ready | None:
        """Take a session's message out again; None if the engine has it already."""
        with self._lock:
            for queues in (self._small, self._large):
                queue = queues.get(session.client, ())
                found = next((ready for ready in queue if ready.session is session), None)
                if found is not None:
                    queues[session.client].remove(found)
                    if not queue:
                        del queues[session.client]
                    return found
        return None

    @property
    def waiting(self) -> bool:
        """Whether anything does."""
        with self._lock:
            return bool(self._small or self._large)

    def take(self) -> list[Ready]:
        """The next batch: small messages that fit, in turn from each client, and one large one."""
        with self._lock:
            # A large one never has to wait for a moment without small ones: half of the batch is always for it.
            kept = min((ready.num_tokens for ready in _heads(self._large)), default=0)
            kept = min(kept, self._batch_tokens // 2)
            small = _in_turn(self._small, self._batch_tokens - kept, most=_MOST_IN_BATCH)
            room = self._batch_tokens - sum(ready.num_tokens for ready in small)
            return small + _in_turn(self._large, max(room, 1), most=1)

    def gather(self) -> None:
        """Wait a moment for sessions that are about to come back: on the engine thread, before a batch.

        Sessions that are answered together come back together, while the others' batch runs; without this, two halves
        would take turns for ever, each at nearly the cost of the whole. Only those count that usually are back within
        about the time of a batch, so nobody far away is waited for, and a session alone never waits.
        """
        longest = min(LONGEST_GATHERING_S, 2 * self._last_batch_s)
        with self._news:
            until = self._clock() + longest
            self._news.wait_for(lambda: not self._about_to_come(until), timeout=longest)

    def _about_to_come(self, until: float) -> bool:
        now = self._clock()
        for session in list(self._away):
            due = session.answered_at + session.back_after_s
            if session.closed or now - due > LONGEST_GATHERING_S:
                del self._away[session]
            elif due <= until:
                return True
        return False

    def run(self) -> list[tuple[Ready, torch.Tensor | FedseaError]]:
        """Run the next batch; on the engine thread."""
        self.gather()
        batch, began = self.take(), self._clock()
        results = self._results(batch)
        with self._lock:
            now = self._clock()
            self._last_batch_s = now - began
            for ready in batch:
                ready.session.answered_at = now
                self._away[ready.session] = None
        return results

    def _results(self, batch: list[Ready]) -> list[tuple[Ready, torch.Tensor | FedseaError]]:
        try:
            turns = [
                Turn(r.session.memory, r.message.positions, r.message.lengths, r.message.sources, r.message.tensors[""])  # type: ignore[index]
                for r in batch
            ]
            return list(zip(batch, self._decoder.run(turns), strict=True))
        except Exception as error:  # noqa: BLE001 (ends these sessions; raised here it would end the run)
            reason = reason_of(error)
            return [(ready, reason) for ready in batch]


def _heads(queues: Queues) -> Iterator[Ready]:
    return (queue[0] for queue in queues.values())


def _in_turn(queues: Queues, room: int, most: int) -> list[Ready]:
    """One message of each client after the other, while they fit; the first fits always if there is any room.

    Whoever was taken from last stands at the end of the next batch's line.
    """
    taken: list[Ready] = []
    while queues and len(taken) < most and room > 0:
        client = next(iter(queues))
        queue = queues[client]
        if taken and queue[0].num_tokens > room:
            break
        taken.append(queue.popleft())
        room -= taken[-1].num_tokens
        del queues[client]
        if queue:
            queues[client] = queue
    return taken
