"""Who may open a session, and in which order those have it for whom there is no room yet.

Nobody is overtaken by those who came later (`line`), with these exceptions: `_Rank` goes before arrival, though not
among a client's own; who waits for sequences of its own client keeps no other client waiting; and who would have more
than its client's share, or is away, holds up others for a while only.

A share is an even part of the memory for each client of the plan. What others leave idle may be had beyond it, and is
taken back when somebody has waited for a while: `Admission.lenders`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from enum import IntEnum

from fedsea.errors import CapacityError, ConfigError, FedseaError, ProtocolError, SessionTooLarge
from fedsea.model.cache import Frozen
from fedsea.model.decoding import Memory, TrunkDecoder, reason_of
from fedsea.model.slabs import capacity_for
from fedsea.plan import InferenceSection
from fedsea.server.batches import Answer, Owners, Session
from fedsea.server.lending import Debts, lenders
from fedsea.server.line import RETRY_AFTER_S, Key, Line, Waiter, failure
from fedsea.server.ports import Member
from fedsea.wire import messages as m

OWED_AFTER_S = 5.0
"""Who was first for so long is owed what others have beyond their share and have not used for as long."""
OWED_IN_USE_AFTER_S = 20.0
"""And after so long also what they do use."""
_HOLDS_S = 20.0
"""So long, and then again after as long, openings of a client that are not within its share hold up others."""


class _Rank(IntEnum):
    """Who goes first."""

    WITHIN = 0  # its client would have no more than its share
    FIRST = 1  # its client has no session yet; else clients whose every session is larger than their share had none
    BEYOND = 2


class Admission:
    """The memory that sessions may have, and the line before it. On the event loop.

    Args:
        settings: The plan's `inference` section.
        decoder: Makes the memory.
        roster: What each client of the plan has.
        clock: Monotonic seconds.

    Attributes:
        used_sequences: By client.
        published: Step and adapters that new sessions see; None while the trunk is not ready.
    """

    def __init__(
        self,
        settings: InferenceSection,
        decoder: TrunkDecoder,
        roster: dict[str, Member],
        clock: Callable[[], float],
    ) -> None:
        self.used_sequences: Counter[str] = Counter()
        self.published: tuple[int, Frozen] | None = None
        self._settings = settings
        self._decoder = decoder
        self._roster = roster
        self._clock = clock
        self._max_bytes = settings.kv_memory_mb << 20
        self._share_bytes = self._max_bytes // len(roster)
        self._used_bytes: Counter[str] = Counter()
        self._held_since: dict[str, float] = {}
        self._ended: dict[Key, tuple[int, Frozen, float]] = {}
        self._line = Line(clock)

    @property
    def num_waiting(self) -> int:
        """Openings in the line."""
        return len(self._line)

    # --- the line ---------------------------------------------------------------------------------------------------

    def ask(self, client: str, owners: Owners, opening: m.SessionOpen, answer: Answer) -> bool:
        """Put an opening into the line, or let it have its place again.

        Returns:
            Whether it has been there before; if not, messages may follow it, and `refuse` is due unless it is admitted
            at once.

        Raises:
            FedseaError: It can never be admitted, or not be remembered.
        """
        try:
            self._check(client, opening)
        except FedseaError:
            self.close((client, opening.owner, opening.session))
            raise
        return self._line.place(client, owners, opening, answer)

    def _check(self, client: str, opening: m.SessionOpen) -> None:
        settings, blocks = self._settings, self._roster[client].blocks
        if opening.blocks != blocks:
            raise ProtocolError(f"Client {client} asked for other blocks than {blocks.start}:{blocks.stop}, its own.")
        if opening.max_tokens > settings.max_tokens:
            raise ProtocolError(
                f"A session of {opening.max_tokens} tokens was asked for; the plan's inference.max_tokens is "
                f"{settings.max_tokens}: shorten prompt or answer."
            )
        if opening.num_sequences > settings.max_sequences:
            raise ProtocolError(
                f"A session of {opening.num_sequences} sequences was asked for; the plan's inference.max_sequences is "
                f"{settings.max_sequences}."
            )
        if self.published is None:
            raise CapacityError("The server is not ready for sessions yet; try again.", RETRY_AFTER_S)
        if not self._decoder.trunk.caches:
            raise ConfigError("Models of this family cannot decode with a cache; training and evaluation work.")
        if (num_bytes := self._bytes(opening)) > self._max_bytes:
            raise SessionTooLarge(
                f"A session would need {math.ceil(num_bytes / 2**20)} MB for keys and values, and the server has "
                f"{settings.kv_memory_mb} MB in all: shorten prompt or answer, ask for fewer sequences, or raise "
                "inference.kv_memory_mb in the plan."
            )

    def refuse(self, key: Key) -> None:
        """Tell a waiter, if it is one, why it has to ask again."""
        if (waiter := self._line.find(key)) is None:
            return
        own, most = self.used_sequences[waiter.client], self._settings.max_sequences
        text = "The memory for keys and values is full at the moment; try again later."
        if own + waiter.opening.num_sequences > most:
            text = (
                f"Client {waiter.client} has {own} sequences open, and the plan's inference.max_sequences is {most}: "
                "close some, or try again later."
            )
        self._line.refuse(waiter, CapacityError(text, RETRY_AFTER_S))

    def close(self, key: Key, owners: Owners | None = None) -> None:
        """An opening is not wanted any more; what is said on a stream does not concern another one, if it is given."""
        waiter = self._line.find(key)
        if waiter is not None and (owners is None or waiter.owners is owners):
            self._line.forget(waiter)
        if owners is None:
            self._ended.pop(key, None)

    def stream_ended(self, owners: Owners, *, for_good: bool) -> None:
        """See `Line.stream_ended`."""
        self._line.stream_ended(owners, for_good=for_good)

    def tick(self) -> None:
        """Refuse who has waited its time, and forget who did not come back."""
        now = self._clock()
        for waiter in self._line.due():
            self.refuse(waiter.key)
        over = [key for key, (_, _, until) in self._ended.items() if now > until]
        for key in over:
            if self._line.find(key) is None:
                del self._ended[key]

    # --- memory -----------------------------------------------------------------------------------------------------

    def fits(self, opening: m.SessionOpen) -> bool:
        """Whether there is room for it, whoever else wants it."""
        return self._decoder.fits(opening.num_sequences, opening.max_tokens)

    def admit(self) -> tuple[Waiter, Memory, int] | None:
        """The next one of the line, its memory, which is charged, and the step of the adapters that it sees.

        Returns:
            None if there is nobody, or no room.
        """
        for waiter, _, fits in self._turns():
            if not fits or waiter.answer is None:
                continue
            assert self.published is not None
            opening, before = waiter.opening, self._ended.get(waiter.key)
            version, frozen = self.published if before is None else before[:2]
            try:
                memory = self._decoder.open(opening.num_sequences, opening.max_tokens, opening.blocks, frozen)
            except Exception as error:  # noqa: BLE001 (told to whose opening it was, and logged)
                self._line.forget(waiter)
                waiter.answer(failure(opening.session, reason_of(error)))
                continue
            self._ended.pop(waiter.key, None)
            self._line.admit(waiter)
            self._charge(waiter.client, memory, 1)
            return waiter, memory, version
        return None

    def free(self, client: str, memory: Memory) -> None:
        """Have a session's memory back."""
        memory.close()
        self._charge(client, memory, -1)

    def _charge(self, client: str, memory: Memory, sign: int) -> None:
        num_sequences = len(memory.caches)
        self.used_sequences[client] += sign * num_sequences
        self._used_bytes[client] += sign * self._decoder.bytes_for(num_sequences, memory.max_tokens)

    def _bytes(self, opening: m.SessionOpen) -> int:
        return self._decoder.bytes_for(opening.num_sequences, opening.max_tokens)

    def _in_order(self) -> list[tuple[Waiter, _Rank]]:
        """Whose turn it is first; without those who wait for sequences of their own client."""
        full: set[str] = set()
        ranks: dict[str, _Rank] = {}
        found = []
        for waiter in self._line:
            client = waiter.client
            if self.used_sequences[client] + waiter.opening.num_sequences > self._settings.max_sequences:
                full.add(client)
            if client not in full:
                ranks[client] = max(self._rank(waiter), ranks.get(client, _Rank.WITHIN))
                found.append((waiter, ranks[client]))
        return sorted(found, key=lambda pair: pair[1])

    def _rank(self, waiter: Waiter) -> _Rank:
        used_bytes = self._used_bytes[waiter.client]
        if used_bytes + self._bytes(waiter.opening) <= self._share_bytes:
            return _Rank.WITHIN
        return _Rank.BEYOND if used_bytes else _Rank.FIRST

    def _turns(self) -> Iterator[tuple[Waiter, _Rank, bool]]:
        """Who may have what is free, in order, and whether it is enough; the last one is whoever keeps it."""
        passed: set[str] = set()
        for waiter, rank in self._in_order():
            if waiter.client in passed:
                continue
            fits = self.fits(waiter.opening)
            yield waiter, rank, fits
            if (fits and waiter.answer is None) or (not fits and self._holds(waiter, rank)):
                return
            if self._bytes(waiter.opening) <= self._share_bytes:
                passed.add(waiter.client)  # those behind it in its own client wait: there is room when others of it end

    def _holds(self, waiter: Waiter, rank: _Rank) -> bool:
        """Whether what is free is kept for a waiter though it is not enough.

        Within a share it always is some day, for others lend. Else nobody knows.
        """
        now = self._clock()
        if waiter.answer is None and waiter.away_s(now) >= 0:
            return False
        if rank is _Rank.WITHIN:
            return True
        since = self._held_since.get(waiter.client, -math.inf)
        if now - since >= 2 * _HOLDS_S:
            since = self._held_since[waiter.client] = now
        return now - since < _HOLDS_S

    def lenders(self, sessions: Collection[Session]) -> list[Session]:
        """Sessions that are to end because somebody has waited long for what their clients have beyond their share.

        Of somebody's only session nothing is owed to a session that is larger than its own client's share: they would
        take it from each other for ever.
        """
        now = self._clock()
        for waiter, rank, fits in self._turns():
            if rank is _Rank.BEYOND:
                break
            if waiter.owed_since is None:
                waiter.owed_since = now
            waited_s = now - waiter.owed_since
            if fits or waiter.answer is None or waited_s < OWED_AFTER_S:
                continue
            idle_s = 0.0 if waited_s >= OWED_IN_USE_AFTER_S else OWED_AFTER_S
            if found := self._lenders(sessions, waiter.opening, rank, idle_s):
                self._held_since[waiter.client] = now  # what is freed is for it
                return found
        return []

    def _lenders(
        self, sessions: Collection[Session], opening: m.SessionOpen, rank: _Rank, idle_s: float
    ) -> list[Session]:
        now = self._clock()
        beyond = {client: used - self._share_bytes for client, used in self._used_bytes.items()}
        idle = {session: session.idle_s(now) for session in sessions}
        debts = Debts(
            beyond={client: math.ceil(num / self._decoder.token_bytes) for client, num in beyond.items()},
            keep_one=rank is not _Rank.WITHIN,
            ready={session: seconds for session, seconds in idle.items() if seconds >= idle_s},
        )
        arena = self._decoder.trunk.arena
        return lenders(arena, sessions, opening.num_sequences, capacity_for(opening.max_tokens), debts)

    def remember(self, session: Session) -> None:
        """A session ends for others: if it comes back while it could have gone on, it sees the adapters that it saw."""
        until = self._clock() + self._settings.lease_s
        self._ended[session.client, *session.key] = session.version, session.memory.frozen, until
