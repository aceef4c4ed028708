"""For whom others wait, and since when: the clock of bounded waiting.

Everybody in a step (or at a round's end) either has its turn, or waits for those who have. Others wait for a client
since it has its turn and somebody else does not: both moments are noted when they come, so that it does not matter
when somebody looks, nor who else is late. While the server computes an evaluation for a client, it is that client
that waits; but an evaluation does not hold up others for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable

RETURN_S = 15.0
"""After a start; a client's longest pause between two attempts to connect, and half as much again."""


EVALUATION_WAITS = 20
"""Others wait for a client that evaluates so many times as long as for one from which nothing comes."""


class Patience:
    """Notes who has its turn since when.

    Args:
        wait_s: Seconds that others wait for one client; None waits for ever.
        clock: Monotonic seconds.
    """

    def __init__(self, wait_s: float | None, clock: Callable[[], float]) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._state: Hashable = None
        self._has_turn: dict[str, tuple[bool, float]] = {}
        self._turn: frozenset[str] = frozenset()
        self._evaluates: dict[str, float] = {}  # since when first, of all that did so while it was their turn

    def note(
        self, state: Hashable, turn: Collection[str], others: Collection[str], served: Collection[str] = ()
    ) -> None:
        """Say how things stand, after everything that may have changed it.

        Args:
            state: What they are at (an attempt of a step, a round's end); another one begins anew.
            turn: Clients from whom something is to come.
            others: Clients that wait for them.
            served: Clients for which an evaluation is computed; their turn begins anew when they have its answer.
        """
        if self._wait_s is None:
            return
        if state != self._state:
            self._state, self._has_turn, self._evaluates = state, {}, {}
        now, before = self._clock(), self._has_turn
        self._turn = frozenset(turn)
        for name in self._turn.intersection(served):
            self._evaluates.setdefault(name, now)
        both = [*((name, True) for name in turn), *((name, False) for name in others)]
        self._has_turn = {
            name: before[name] if name in before and before[name][0] is mine else (mine, now)
            for name, mine in both
            if name not in served
        }

    def exhausted(self) -> tuple[str, ...]:
        """Clients for whom others have waited long enough; none while nobody waits."""
        waiting = [since for mine, since in self._has_turn.values() if not mine]
        if self._wait_s is None or not waiting:
            return ()
        began, now = min(waiting), self._clock()
        silent = [(name, since, self._wait_s) for name, (mine, since) in self._has_turn.items() if mine]
        most_s = EVALUATION_WAITS * self._wait_s
        busy = [(name, since, most_s) for name, since in self._evaluates.items() if name in self._turn]
        late = (name for name, since, most_s in (*silent, *busy) if now - max(began, since) >= most_s)
        return tuple(dict.fromkeys(late))


class Returning:
    """Who may not have found the server again since it started: clients seek it with pauses of up to ten seconds.

    Args:
        names: All clients.
        clock: Monotonic seconds.
    """

    def __init__(self, names: Collection[str], clock: Callable[[], float]) -> None:
        self._away = set(names)
        self._clock = clock
        self._until = clock() + RETURN_S

    def here(self, name: str) -> None:
        """It has come."""
        self._away.discard(name)

    def among(self, names: Collection[str]) -> tuple[str, ...]:
        """Those of these that may still be on their way."""
        return tuple(name for name in names if name in self._away) if self._clock() < self._until else ()
