"""Which sessions end so that somebody has its share of memory: few, and none unless it is enough.

Memory comes back by the slab. So what is looked for are slabs that are emptied by ending few sessions, and sessions
that have a slot of the capacity that is wanted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fedsea.model.cache import CacheArena
from fedsea.model.slabs import Slab
from fedsea.server.batches import Session


@dataclass(frozen=True, slots=True)
class Debts:
    """Who lends.

    Attributes:
        beyond: By client, what its sessions may become beyond its share, in tokens.
        keep_one: Whether the last session of a client stays.
        ready: Sessions that may end at all; seconds for which they were idle.
    """

    beyond: dict[str, int]
    keep_one: bool
    ready: dict[Session, float]


def tokens_of(session: Session) -> int:
    """What a session asked for, in the capacities that its sequences need."""
    return session.memory.num_tokens


def lenders(
    arena: CacheArena, sessions: Collection[Session], num_sequences: int, capacity: int, debts: Debts
) -> list[Session]:
    """Sessions whose end makes room for so many sequences of a capacity; none if there are not enough that may end."""
    search = _Search(arena, sessions, capacity, debts)
    if search.slots(debts.ready) < num_sequences:
        return []
    while (missing := num_sequences - search.slots(search.ended)) > 0:
        if not search.end_some(missing):
            return []
    for session in list(search.ended):  # whatever has become needless by later ones
        rest = search.ended.keys() - {session}
        if search.slots(rest) >= num_sequences:
            del search.ended[session]
    return list(search.ended)


class _Search:
    def __init__(self, arena: CacheArena, sessions: Collection[Session], capacity: int, debts: Debts) -> None:
        self.ended: dict[Session, None] = {}
        self._arena = arena
        self._capacity = capacity
        self._debts = debts
        self._beyond = Counter(debts.beyond)
        self._num_left = Counter(session.client for session in sessions)
        self._slabs: defaultdict[Slab, Counter[Session]] = defaultdict(Counter)
        for session in sessions:
            for cache in session.memory.caches:
                self._slabs[cache.slab][session] += 1
        self._spare: Counter[int] = Counter()
        for slab in self._slabs:
            self._spare[slab.capacity] += len(slab.free)

    def slots(self, ended: Collection[Session]) -> int:
        """Room for sequences when these sessions have ended."""
        slots, tokens = self._arena.free_slots(self._capacity), self._arena.free_tokens
        for slab in {cache.slab for session in ended for cache in session.memory.caches}:
            num_ended = sum(num for session, num in self._slabs[slab].items() if session in ended)
            is_large = slab.capacity >= self._capacity
            if num_ended + len(slab.free) == slab.num_slots:
                tokens += slab.num_tokens
                slots -= len(slab.free) * is_large
            else:
                slots += num_ended * is_large
        return slots + tokens // self._capacity

    def end_some(self, missing: int) -> bool:
        """End those who free most for each of them, and of equals who were idle for longest."""
        most, ready = missing * self._capacity, self._debts.ready
        best = max(
            self._choices(),
            key=lambda choice: (min(choice[1], most) / len(choice[0]), min(ready[session] for session in choice[0])),
            default=None,
        )
        if best is None:
            return False
        sessions, _, slab = best
        for session in self._not_lent(sessions):
            self._spare[slab.capacity] -= len(session.memory.caches)
        for session in sessions:
            self._beyond[session.client] -= tokens_of(session)
            self._num_left[session.client] -= 1
            self.ended[session] = None
        return True

    def _choices(self) -> Iterator[tuple[list[Session], int, Slab]]:
        """Sessions that may end, tokens that are had by it, and in which slab."""
        for slab, num_of in self._slabs.items():
            rest = [session for session in num_of if session not in self.ended]
            if slab.capacity >= self._capacity:
                for session in rest:
                    if session in self._debts.ready and not self._not_lent([session]):
                        yield [session], num_of[session] * self._capacity, slab
            if rest and all(session in self._debts.ready for session in rest):
                aside = self._not_lent(rest)
                if not aside or self._have_room_elsewhere(aside, slab):
                    yield rest, slab.num_tokens, slab

    def _not_lent(self, sessions: Sequence[Session]) -> list[Session]:
        """Those of them that their clients do not lend, since they would have less than their share."""
        lent: Counter[str] = Counter()
        num_lent: Counter[str] = Counter()
        kept = []
        for session in sorted(sessions, key=tokens_of):
            client = session.client
            is_last = self._debts.keep_one and self._num_left[client] - num_lent[client] < 2
            if self._beyond[client] > lent[client] and not is_last:
                lent[client] += tokens_of(session)
                num_lent[client] += 1
            else:
                kept.append(session)
        return kept

    def _have_room_elsewhere(self, sessions: Sequence[Session], slab: Slab) -> bool:
        """Whether they only have to move, to slots that are too small for whoever waits; else few keep many slabs."""
        if self._debts.keep_one or slab.capacity >= self._capacity:
            return False
        num_sequences = sum(len(session.memory.caches) for session in sessions)
        return num_sequences <= self._spare[slab.capacity] - len(slab.free)
