"""Who may open a session, and in which order those have it for whom there is no room yet.

Nobody is overtaken by those who came later (`line`), with two exceptions: `_Rank` goes before arrival, and who waits
for sequences of its own client keeps no other client waiting.

A share is an even part of the memory for each client of the plan. What others leave idle may be had beyond it, and is
taken back when somebody has waited for a while: `Admission.lender`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from enum import IntEnum

from fedsea.errors import CapacityError, ConfigError, FedseaError, ProtocolError, SessionTooLarge
from fedsea.model.cache import Frozen
from fedsea.model.decoding import Memory, TrunkDecoder, reason_of
from fedsea.plan import InferenceSection
from fedsea.server.batches import Answer, Owners, Session
from fedsea.server.line import RETRY_AFTER_S, Key, Line, Waiter, failure
from fedsea.server.ports import Member
from fedsea.wire import messages as m

OWED_AFTER_S = 5.0
"""Who has waited so long is owed what others have beyond their share and have not used for as long."""
OWED_IN_USE_AFTER_S = 20.0
"""And after so long also what they do use."""


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
        self._memories: defaultdict[str, dict[int, Memory]] = defaultdict(dict)
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
            self.forget((client, opening.owner, opening.session))
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

    def forget(self, key: Key) -> None:
        """An opening is not wanted any more."""
        self._line.forget(key)

    def stream_ended(self, owners: Owners, *, for_good: bool) -> None:
        """See `Line.stream_ended`."""
        self._line.stream_ended(owners, for_good=for_good)

    def tick(self) -> None:
        """Refuse who has waited its time, and forget who did not come back."""
        for waiter in self._line.due():
            self.refuse(waiter.key)

    # --- memory -----------------------------------------------------------------------------------------------------

    def admit(self) -> tuple[Waiter, Memory, int] | None:
        """The next one of the line, its memory, which is charged, and the step of the adapters that it sees.

        Returns:
            None if there is nobody, or no room.
        """
        for waiter in self._in_order():
            if waiter.answer is None:
                return None  # what is free is kept for it
            assert self.published is not None
            (version, frozen), opening = self.published, waiter.opening
            try:
                memory = self._decoder.open(opening.num_sequences, opening.max_tokens, opening.blocks, frozen)
            except CapacityError:
                return None
            except Exception as error:  # noqa: BLE001 (told to whose opening it was, and logged)
                self.forget(waiter.key)
                waiter.answer(failure(opening.session, reason_of(error)))
                continue
            self.forget(waiter.key)
            self._memories[waiter.client][id(memory)] = memory
            self.used_sequences[waiter.client] += opening.num_sequences
            return waiter, memory, version
        return None

    def free(self, client: str, memory: Memory) -> None:
        """Have a session's memory back."""
        memory.close()
        del self._memories[client][id(memory)]
        self.used_sequences[client] -= len(memory.caches)

    def _used_bytes(self, client: str) -> float:
        """What the client's sessions keep, slabs included of which nobody has the rest."""
        return sum(map(self._decoder.bytes_of, self._memories[client].values()))

    def _bytes(self, opening: m.SessionOpen) -> int:
        return self._decoder.bytes_for(opening.num_sequences, opening.max_tokens)

    def _in_order(self) -> list[Waiter]:
        """Whose turn it is first; without those who wait for sequences of their own client."""
        full: set[str] = set()
        found = []
        for waiter in self._line:
            own = self.used_sequences[waiter.client] + waiter.opening.num_sequences
            if own > self._settings.max_sequences:
                full.add(waiter.client)
            if waiter.client not in full:
                found.append(waiter)
        if len(found) < 2:  # as a rule: what sessions keep need not be counted
            return found
        used = {client: self._used_bytes(client) for client in {waiter.client for waiter in found}}
        return sorted(found, key=lambda waiter: self._rank(waiter, used[waiter.client]))

    def _rank(self, waiter: Waiter, used_bytes: float) -> _Rank:
        if used_bytes + self._bytes(waiter.opening) <= self._share_bytes:
            return _Rank.WITHIN
        return _Rank.BEYOND if used_bytes else _Rank.FIRST

    def lender(self, sessions: Collection[Session]) -> Session | None:
        """Whichever session is to end because somebody has waited long for what its client has beyond its share.

        Of such a client the one that was not used for longest. Of somebody's only session nothing is owed to a session
        that is larger than its own client's share: they would take it from each other for ever.
        """
        waiter, now = next(iter(self._in_order()), None), self._clock()
        if waiter is None or waiter.answer is None or (waited_s := now - waiter.since) < OWED_AFTER_S:
            return None
        if (rank := self._rank(waiter, self._used_bytes(waiter.client))) is _Rank.BEYOND:
            return None
        count = Counter(session.client for session in sessions)
        beyond = {client for client in count if self._used_bytes(client) > self._share_bytes}
        least_s = 0.0 if waited_s >= OWED_IN_USE_AFTER_S else OWED_AFTER_S
        lenders = [
            session
            for session in sessions
            if session.client in beyond
            and (rank is _Rank.WITHIN or count[session.client] > 1)
            and session.idle_s(now) >= least_s
        ]
        return max(lenders, key=lambda session: session.idle_s(now), default=None)
