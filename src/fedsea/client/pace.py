"""How many tokens to draft for the next round trip, from what trips and drafts have cost and how many were right."""

from __future__ import annotations

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 1.0
_PRIOR_SLOPE = 0.02
"""Of the base, for one more row: little, so that drafts are tried early."""
_OUTLIER = 2.0
"""A trip longer than so many times the expected one counts as that: a replay or a pause says nothing of the next."""


class Pace:
    """Chooses the number of drafts that gives most tokens a second.

    A trip with r rows takes `base + slope * r`, both fitted to recent trips, so a long way to the server makes for many
    drafts and a busy server for few. What was seen fades: after a while without drafts they are tried again.

    Args:
        most: Most drafts of a trip.
        decay: What the last trip's evidence weighs one trip later.
    """

    def __init__(self, most: int, decay: float = 0.93) -> None:
        self.most = most
        self._decay = decay
        self._right = self._tested = 0.0
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._draft_s = self._drafts = 0.0

    @property
    def acceptance(self) -> float:
        """Probability that a draft is right if those before it were."""
        return (self._right + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT) / (self._tested + _PRIOR_WEIGHT)

    @property
    def trip_s(self) -> tuple[float, float]:
        """Base and slope of a trip's time; zeros before the first one."""
        if not self._weight:
            return 0.0, 0.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        # A ridge around the prior slope: trips of one size say nothing about it.
        spread = self._rows_rows / self._weight - rows * rows
        common = self._rows_seconds / self._weight - rows * seconds
        prior = _PRIOR_SLOPE * seconds
        slope = min(max((common + 0.1 * prior) / (spread + 0.1), 0.0), seconds / rows)
        return seconds - slope * rows, slope

    def choose(self) -> int:
        """Drafts for the next trip, 0 to `most`."""
        base, slope = self.trip_s
        if base + slope <= 0:
            return min(4, self.most)
        draft_s = self._draft_s / self._drafts if self._drafts else 0.0
        best, best_rate, expected, reach = 0, 0.0, 0.0, 1.0
        for drafts in range(self.most + 1):
            expected += reach  # tokens of a trip: 1 + a + a² + …
            reach *= self.acceptance
            rate = expected / (base + slope * (drafts + 1) + draft_s * drafts)
            if rate > best_rate:
                best, best_rate = drafts, rate
        return best

    def tripped(self, rows: int, seconds: float) -> None:
        """A trip with so many rows took so long."""
        base, slope = self.trip_s
        if self._weight:
            seconds = min(seconds, _OUTLIER * (base + slope * rows))
        decay = self._decay
        self._weight = self._weight * decay + 1
        self._rows = self._rows * decay + rows
        self._seconds = self._seconds * decay + seconds
        self._rows_rows = self._rows_rows * decay + rows * rows
        self._rows_seconds = self._rows_seconds * decay + rows * seconds

    def drafted(self, drafts: int, seconds: float) -> None:
        """So many drafts took so long to make."""
        if drafts:
            self._drafts = self._drafts * self._decay + drafts
            self._draft_s = self._draft_s * self._decay + seconds

    def verified(self, drafted: int, accepted: int) -> None:
        """Of so many drafts so many were right; those behind a wrong one were never tested."""
        self._right = self._right * self._decay + accepted
        self._tested = self._tested * self._decay + min(drafted, accepted + 1)
