"""The line of those who wait for room to open a session: who stands where, and for how long.

An opening that finds no room is refused once, for messages follow a first opening at once and cannot wait with it; when
its client asks again, its answer waits for room, for a bounded time. It keeps its place while it asks, and loses it
when it does not come back, or is away for longer than it is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedsea.errors import CapacityError, FedseaError
from fedsea.server.batches import Answer, Owners
from fedsea.wire import messages as m

RETRY_AFTER_S = 0.2
HELD_S = 2.0
"""So long the answer to an opening waits for room."""
BACK_WITHIN_S = 5.0
"""Whoever was refused, or whose stream broke, and does not ask again within this, has lost its place; so has whoever is
away for so much longer than it is there."""
_MOST_OF_A_CLIENT = 256
"""Openings; more are refused and not remembered."""

Key = tuple[str, int, int]
"""Client, owner, number of the session."""


@dataclass(slots=True, eq=False)
class Waiter:
    """An opening without an answer, or one that was refused and is expected again.

    Attributes:
        owners: The stream on which it came last.
        answer: Queues the answer on that stream; None when it was refused, or its stream has ended: it is away.
        changed_at: Since when it is there, or away.
        until: When it is refused; or forgotten, if there is nobody to be answered.
        owed_since: Since when it is first among those who are owed room; see `Admission.lenders`.
    """

    client: str
    owners: Owners
    opening: m.SessionOpen
    answer: Answer | None
    changed_at: float
    until: float
    owed_since: float | None = None
    _away_s: float = 0.0

    @property
    def key(self) -> Key:
        """Whose it is."""
        return self.client, self.opening.owner, self.opening.session

    def away_s(self, now: float) -> float:
        """So much longer it was away than there; the last `HELD_S` of being there count."""
        passed_s = now - self.changed_at
        return self._away_s + passed_s if self.answer is None else max(-HELD_S, self._away_s - passed_s)

    def turn(self, answer: Answer | None, now: float) -> None:
        """It is there from now on, or away."""
        self._away_s, self.changed_at, self.answer = self.away_s(now), now, answer
        self.until = now + (HELD_S if answer else BACK_WITHIN_S - max(0.0, self._away_s))


class Line:
    """Waiters in the order of their arrival.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiters: dict[Key, Waiter] = {}
        self._num_of: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters.values())

    def __len__(self) -> int:
        return len(self._waiters)

    def place(self, client: str, owners: Owners, opening: m.SessionOpen, answer: Answer) -> bool:
        """Let an opening stand where it stood, or at the end.

        Returns:
            Whether it stood there already.

        Raises:
            CapacityError: Too many of its client do.
        """
        now = self._clock()
        waiter = self._waiters.get((client, opening.owner, opening.session))
        if waiter is not None:
            waiter.turn(answer, now)
            waiter.owners, waiter.opening = owners, opening
            return True
        if self._num_of[client] >= _MOST_OF_A_CLIENT:
            raise CapacityError(f"Client {client} waits for {_MOST_OF_A_CLIENT} sessions already; try again later.")
        waiter = Waiter(client, owners, opening, answer, now, now + HELD_S)
        self._waiters[waiter.key] = waiter
        self._num_of[client] += 1
        return False

    def find(self, key: Key) -> Waiter | None:
        """A waiter, if it is there."""
        return self._waiters.get(key)

    def refuse(self, waiter: Waiter, error: CapacityError) -> None:
        """Tell a waiter to ask again; it keeps its place."""
        if waiter.answer is not None:
            waiter.answer(failure(waiter.opening.session, error))
            waiter.turn(None, self._clock())

    def admit(self, waiter: Waiter) -> None:
        """It has its room, and does not wait any more."""
        del self._waiters[waiter.key]
        self._num_of[waiter.client] -= 1

    def forget(self, waiter: Waiter) -> None:
        """It does not wait any more, and there is no such session."""
        self.admit(waiter)
        forget_owner(waiter.owners, waiter.opening.session, waiter.opening.owner)

    def stream_ended(self, owners: Owners, *, for_good: bool) -> None:
        """Nobody can be answered on a stream any more; after a break, its client may be back soon."""
        for waiter in [waiter for waiter in self if waiter.owners is owners]:
            if for_good:
                self.forget(waiter)
            elif waiter.answer is not None:
                waiter.turn(None, self._clock())

    def due(self) -> list[Waiter]:
        """Who has waited its time and is to be refused; who did not come back is forgotten."""
        over = [waiter for waiter in self if self._clock() >= waiter.until]
        for waiter in over:
            if waiter.answer is None:
                self.forget(waiter)
        return [waiter for waiter in over if waiter.answer is not None]


def forget_owner(owners: Owners, session: int, owner: int) -> None:
    """A stream's session is over; the number may have another owner meanwhile."""
    if owners.get(session) == owner:
        del owners[session]


def failure(session: int, error: FedseaError) -> m.SessionFailed:
    """What a client is told of a session that is not opened, or has ended."""
    return m.SessionFailed(session, error.code, error.message, getattr(error, "retry_after_s", 0.0))
