"""Which segments a plan trains: decided here alone, from the cut, the adapter's settings and their targets.

What a target means depends on the model, which a plan does not know. Where it could mean a layer of a segment, the
segment counts as trained: its channels then count as open, and what leaves it as in need of noise.
`model.adapters.check_plan` refuses a plan that counts a segment whose model has no such layer there.
"""

from __future__ import annotations

from fedsea.plan.sections import AdapterSection
from fedsea.types import SegmentKind

HEADS_ONLY = frozenset({"lm_head", "embed_out"})
"""Names that only heads have; a layer of a block that is called so is not adapted."""

HEADS = HEADS_ONLY | {"output", "output_layer"}
"""All names of heads that can be adapted: outside the blocks, no other layer is."""


def adapts_blocks(settings: AdapterSection) -> bool:
    """Whether the targets may mean layers of blocks."""
    return settings.targets == "all-linear" or any(_leaf(target) not in HEADS_ONLY for target in settings.targets)


def adapts_head(settings: AdapterSection) -> bool:
    """Whether the targets may mean the model's head."""
    return settings.targets != "all-linear" and any(_leaf(target) in HEADS for target in settings.targets)


def trains(settings: AdapterSection, kind: SegmentKind, num_blocks: int) -> bool:
    """Whether a segment has trained parameters.

    Args:
        settings: The plan's.
        kind: Which segment; the output segment has the head, whatever its blocks.
        num_blocks: Its blocks.
    """
    training = getattr(settings, kind.value)
    if training != "adapter":
        return bool(training == "full")  # the input segment has the embedding, and the output segment norm and head
    return (num_blocks > 0 and adapts_blocks(settings)) or (kind is SegmentKind.OUTPUT and adapts_head(settings))


def trains_blocks(settings: AdapterSection, kind: SegmentKind) -> bool:
    """Whether the blocks of a segment have trained parameters, if it has blocks."""
    training = getattr(settings, kind.value)
    return bool(training == "full") or (training == "adapter" and adapts_blocks(settings))


def _leaf(target: str) -> str:
    return target.rpartition(".")[2]
