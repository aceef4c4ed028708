"""What a release costs, and which units it is charged to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedsea.plan import FederationPlan, NoiseSection
from fedsea.privacy.accountant import charge_of, mu_of
from fedsea.types import Channel, Origin, Purpose


@dataclass(frozen=True, slots=True)
class Charge:
    """What one release spends, in mu^2.

    Attributes:
        releases: Sequences, or pieces of some, that are released.
        units: Unit and amount; a unit may come several times.
        every: Spent by every unit, known or not.
        bounded: Whether the amounts are known at all; False where no clip or no noise bounds the release.
    """

    channel: Channel
    purpose: Purpose
    releases: int
    units: tuple[tuple[str, float], ...] = ()
    every: float = 0.0
    bounded: bool = True


@dataclass(slots=True)
class Pricing:
    """Prices the releases of a client.

    A release of a whole sequence costs (2 C / sigma)^2, for each unit that the sequence is of. In a session a sequence
    comes in pieces, each chosen after the answers to the ones before. There every row is clipped to C / sqrt(M), where
    M is the most rows that the sequence may have: a row costs 1/M of a sequence, M of them together as much as a whole
    one, and rows that are released anew, after some were taken back, are paid anew. As mu^2 adds up under adaptive
    composition, the sum holds however long the sequence becomes.

    With the unit "token", a token of a prompt has one row in each sequence of a session; but what is drafted or chosen
    after it may be its copy, or depend on it, and is told apart from new text by nobody: each later row is paid whole.

    Where the rows of a sequence also depend on parameters that are trained here, on text and without noise, every
    release depends on every unit that was trained on: it is charged to all units. It is charged to all of them too
    where nobody knows of which unit it is.

    Args:
        plan: The plan.
        name: The client.
        noise: Its noise, the plan's or stricter.
    """

    plan: FederationPlan
    name: str
    noise: NoiseSection
    _prices: dict[Channel, float | None] = field(init=False)
    _pooled: dict[Channel, bool] = field(init=False)
    limit: float = field(init=False)

    def __post_init__(self) -> None:
        noise = self.noise
        self._prices = {
            channel: charge_of(noise.clip(channel), noise.std(channel))
            if noise.clip(channel) and noise.std(channel)
            else None
            for channel in Channel
        }
        self._pooled = pooled(self.plan, self.name)
        self.limit = mu_of(noise.epsilon, noise.delta) ** 2 if noise.epsilon else math.inf

    def charge(self, channel: Channel, origin: Origin | None) -> Charge:
        """What a release costs.

        Args:
            channel: Where it leaves.
            origin: Of hidden states and gradients; an update comes from everything that was trained on.
        """
        price = self._prices[channel]
        purpose = Purpose.TRAINING if origin is None else origin.purpose
        releases = 1 if origin is None else sum(1 for length in origin.lengths if length)
        if price is None:
            return Charge(channel, purpose, releases, bounded=False)
        if origin is None:
            return Charge(channel, purpose, releases, every=price)
        if origin.most_rows:
            # Sequences of one session may have one prompt (beams), so they count as one unit.
            shares = origin.turns if self.noise.unit == "token" else sum(origin.lengths) / origin.most_rows
            return Charge(channel, purpose, releases, every=price * shares)
        if self._pooled[channel] or not origin.documents:  # unknown ones may all be of one text
            return Charge(channel, purpose, releases, every=price * releases)
        return Charge(channel, purpose, releases, tuple((unit, price) for unit in self._units(origin)))

    def _units(self, origin: Origin) -> list[str]:
        if self.noise.unit == "document" or not origin.pieces:
            return list(origin.documents)
        found = []
        for document, piece in zip(origin.documents, origin.pieces, strict=True):
            found.append(f"{document}.{piece}")
            if self.noise.unit == "token" and piece:  # its first token is the last one of the piece before, too
                found.append(f"{document}.{piece - 1}")
        return found


def pooled(plan: FederationPlan, name: str) -> dict[Channel, bool]:
    """Whether what leaves on a channel depends on parameters that this client trains on its text."""
    return {
        Channel.HIDDEN: plan.trains_below_cut(name),
        Channel.GRADIENT: plan.trains_output(name),
        Channel.UPDATE: True,
    }
