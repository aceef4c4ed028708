"""What secure aggregation needs of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsea.plan.trained import trains_blocks
from fedsea.types import SegmentKind

if TYPE_CHECKING:
    from fedsea.plan.federation import FederationPlan

MOST_CLIENTS = 64
"""All members' certificates and keys travel in one message's header."""


def threshold_of(plan: FederationPlan) -> int:
    """Clients that must stay to the end of a secure round: as the plan says, or the smallest two-thirds majority."""
    return plan.aggregation.secure_threshold or 2 * len(plan.clients) // 3 + 1


def check_secure(plan: FederationPlan) -> None:
    """Refuse a plan whose sums cannot be made, or would show too much.

    Raises:
        ValueError: Says which key to change.
    """
    settings, count = plan.aggregation, len(plan.clients)
    if not settings.secure:
        return
    if settings.sync != "round" or settings.method != "mean":
        raise ValueError(
            'aggregation.secure sums parameters once a round: set aggregation.sync = "round" and '
            'aggregation.method = "mean" (a median, or single gradients, would need the clients\' own values)'
        )
    if not plan.clients_train:
        raise ValueError("aggregation.secure has nothing to sum: the clients train no parameters of their own")
    if not settings.secure_min <= count <= MOST_CLIENTS:
        raise ValueError(
            f"aggregation.secure needs {settings.secure_min} (aggregation.secure_min) to {MOST_CLIENTS} clients, and "
            f"the plan has {count}"
        )
    threshold = threshold_of(plan)
    if not count // 2 < threshold <= count:
        raise ValueError(
            f"aggregation.secure_threshold must be a majority of the {count} clients: {count // 2 + 1} to {count}; "
            "with less, a server could show two halves different sums"
        )
    cuts = [plan.partition_of(name) for name in plan.client_names]
    for kind, side in ((SegmentKind.INPUT, "input"), (SegmentKind.OUTPUT, "output")):
        counts = [getattr(cut, f"{side}_blocks") for cut in cuts]
        for block in range(max(counts) if trains_blocks(plan.adapter, kind) else 0):
            holders = sum(count > block for count in counts)
            if holders < settings.secure_min:
                raise ValueError(
                    f"aggregation.secure: only {holders} of the clients have {side}_blocks above {block}, so the sum "
                    f"of these blocks' parameters would be theirs alone; secure_min is {settings.secure_min}: give at "
                    "least so many clients the same cut"
                )
