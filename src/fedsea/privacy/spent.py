"""What a ledger's charges add up to, unit by unit, in mu^2."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsea.types import Channel, Purpose

_SLACK = 1e-9
"""Relative; sums of very many charges round."""


@dataclass(slots=True)
class Account:
    """The releases of one channel for one purpose.

    Attributes:
        releases: Sequences, or pieces of some, that were released.
        every: Spent by every unit.
        by_unit: Spent by each unit besides, by its number.
    """

    releases: int = 0
    every: float = 0.0
    by_unit: array[float] = field(default_factory=lambda: array("d"))

    @property
    def most(self) -> float:
        """mu^2 of the unit that has spent most here."""
        return self.every + max(self.by_unit, default=0.0)


class Spent:
    """Sums over charges. Units are kept as keyed hashes, by number: nothing in them says what a unit is.

    Attributes:
        salt: The ledger's own; makes the hashes useless elsewhere.
        accounts: By channel and purpose.
        unbounded: Releases whose cost nobody knows, by channel.
    """

    def __init__(self) -> None:
        self.salt = b""
        self.accounts: dict[tuple[Channel, Purpose], Account] = {}
        self.unbounded: dict[Channel, int] = {}
        self._numbers: dict[str, int] = {}
        self._total = Account()
        self._most = 0.0

    @property
    def total(self) -> float:
        """mu^2 of the unit that has spent most, over all channels and purposes."""
        return self._total.every + self._most

    @property
    def num_units(self) -> int:
        """Units that are known by name."""
        return len(self._numbers)

    def account(self, channel: Channel, purpose: Purpose) -> Account:
        """The account of a channel and purpose; empty if nothing was released."""
        return self.accounts.get((channel, purpose), Account())

    def key(self, unit: str) -> str:
        """The keyed hash of a unit."""
        return hashlib.blake2b(unit.encode(), digest_size=12, key=self.salt).hexdigest()

    def numbered(self, units: Iterable[tuple[str, float]]) -> tuple[list[tuple[int, float]], list[str]]:
        """Units by number, and the hashes of those that get their number now."""
        new: dict[str, int] = {}
        pairs = []
        for unit, amount in units:
            key = self.key(unit)
            number = self._numbers.get(key)
            if number is None:
                number = new.setdefault(key, len(self._numbers) + len(new))
            pairs.append((number, amount))
        return pairs, list(new)

    def room_for(self, units: Sequence[tuple[int, float]], every: float, limit: float) -> bool:
        """Whether every unit stays within a limit after a charge."""
        added: dict[int, float] = {}
        for number, amount in units:
            added[number] = added.get(number, 0.0) + amount
        held = self._total.by_unit
        most = max((held[n] + a if n < len(held) else a for n, a in added.items()), default=0.0)
        return self._total.every + every + max(self._most, most) <= limit * (1 + _SLACK)

    def take(self, entry: Mapping[str, Any]) -> None:
        """Add a charge as the ledger has it."""
        channel, purpose, releases = Channel(entry["c"]), Purpose(entry["p"]), int(entry["n"])
        account = self.accounts.setdefault((channel, purpose), Account())
        account.releases += releases
        if entry.get("unbounded"):
            self.unbounded[channel] = self.unbounded.get(channel, 0) + releases
            return
        for key in entry.get("new", ()):
            self._numbers[key] = len(self._numbers)
        every = float(entry.get("every", 0.0))
        units = [(int(number), float(amount)) for number, amount in entry.get("units", ())]
        if every < 0 or any(amount < 0 or not 0 <= number < len(self._numbers) for number, amount in units):
            raise ValueError("a charge that cannot be")
        for where in (account, self._total):
            where.every += every
            for number, amount in units:
                if number >= len(where.by_unit):
                    where.by_unit.extend([0.0] * (number + 1 - len(where.by_unit)))
                where.by_unit[number] += amount
        for number, _ in units:
            self._most = max(self._most, self._total.by_unit[number])
