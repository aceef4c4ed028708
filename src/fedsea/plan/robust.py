"""What averages that limit a single client's effect need of a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsea.plan.federation import FederationPlan

LEAST = 3
"""Of fewer clients a median is the plain average, and nobody can be cut off at both ends."""


def num_trimmed(fraction: float, count: int) -> int:
    """Values that "trimmed_mean" cuts off at each end; some always stay.

    >>> [num_trimmed(0.29, count) for count in (2, 3, 4, 100)]
    [0, 0, 1, 29]
    """
    return min(int(round(fraction * count, 9)), (count - 1) // 2)


def check_robust(plan: FederationPlan) -> None:
    """Refuse a plan whose median or trimmed mean would let one client pull the average wherever it wants.

    Raises:
        ValueError: Says which key to change.
    """
    settings, count = plan.aggregation, len(plan.clients)
    if settings.method == "mean" or settings.sync != "round" or not plan.clients_train:
        return
    if count < LEAST:
        raise ValueError(
            f'aggregation.method = "{settings.method}" limits nothing with fewer than {LEAST} clients: set '
            'aggregation.method = "mean"'
        )
    if settings.method == "trimmed_mean" and num_trimmed(settings.trim_fraction, count) == 0:
        raise ValueError(
            f"aggregation.trim_fraction = {settings.trim_fraction:g} cuts off none of {count} clients: set it to "
            f"{math.ceil(100 / count) / 100:g} or more, for one at each end"
        )
