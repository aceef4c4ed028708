"""The line of those who wait for room to open a session: who stands where, and for how long.

An opening that finds no room is refused once, for messages follow a first opening at once and cannot wait with it; when
its client asks again, its answer waits for room, for a bounded time. It keeps its place while it asks, and loses it
when it does not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedsea.errors import CapacityError, FedseaError
from fedsea.server.batches import Answer, Owners
from fedsea.wire import messages as m

RETRY_AFTER_S = 0.2
HELD_S = 2.0
"""So long the answer to an opening waits for room."""
BACK_WITHIN_S = 5.0
"""Whoever was refused, or whose stream broke, and does not ask again within this, has lost its place."""
_MOST_OF_A_CLIENT = 256
"""Openings; more are refused and not remembered."""

Key = tuple[str, int, int]
"""Client, owner, number of the session."""


@dataclass(slots=True, eq=False)
class Waiter:
    """An opening without an answer, or one that was refused and is expected again.

    Attributes:
        owners: The stream on which it came last.
        since: When it came first.
        answer: Queues the answer on that stream; None when it was refused, or its stream has ended.
        until: When it is refused; or forgotten, if there is nobody to be answered.
    """

    client: str
    owners: Owners
    opening: m.SessionOpen
    since: float
    answer: Answer | None
    until: float

    @property
    def key(self) -> Key:
        """Whose it is."""
        return self.client, self.opening.owner, self.opening.session


class Line:
    """Waiters in the order of their arrival.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiters: dict[Key, Waiter] = {}

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
        key = (client, opening.owner, opening.session)
        before, now = self._waiters.get(key), self._clock()
        if before is None and sum(waiter.client == client for waiter in self) >= _MOST_OF_A_CLIENT:
            raise CapacityError(f"Client {client} waits for {_MOST_OF_A_CLIENT} sessions already; try again later.")
        since = now if before is None else before.since
        self._waiters[key] = Waiter(client, owners, opening, since, answer, now + HELD_S)  # a dict keeps a key's place
        return before is not None

    def find(self, key: Key) -> Waiter | None:
        """A waiter, if it is there."""
        return self._waiters.get(key)

    def refuse(self, waiter: Waiter, error: CapacityError) -> None:
        """Tell a waiter to ask again; it keeps its place."""
        if waiter.answer is not None:
            waiter.answer(failure(waiter.opening.session, error))
            self._expect(waiter)

    def _expect(self, waiter: Waiter) -> None:
        waiter.answer, waiter.until = None, self._clock() + BACK_WITHIN_S

    def forget(self, key: Key) -> None:
        """It does not wait any more."""
        self._waiters.pop(key, None)

    def stream_ended(self, owners: Owners, *, for_good: bool) -> None:
        """Nobody can be answered on a stream any more; after a break, its client may be back soon."""
        for waiter in [waiter for waiter in self if waiter.owners is owners]:
            if for_good:
                self.forget(waiter.key)
            elif waiter.answer is not None:
                self._expect(waiter)

    def due(self) -> list[Waiter]:
        """Who has waited its time and is to be refused; who did not come back is forgotten."""
        over = [waiter for waiter in self if self._clock() >= waiter.until]
        for waiter in over:
            if waiter.answer is None:
                self.forget(waiter.key)
        return [waiter for waiter in over if waiter.answer is not None]


def failure(session: int, error: FedseaError) -> m.SessionFailed:
    """What a client is told of a session that is not opened, or has ended."""
    return m.SessionFailed(session, error.code, error.message, getattr(error, "retry_after_s", 0.0))
