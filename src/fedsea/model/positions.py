"""How far a model's positions reach: the longest sequence that it can run, and runs alike in any company."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TABLE = re.compile(r"(?:^|\.)(?:wpe|\w*pos\w*)$")


@dataclass(frozen=True, slots=True)
class Reach:
    """A bound on the length of sequences.

    Attributes:
        tokens: Longest sequence.
        reason: What is so with a longer one; a clause of its own.
    """

    tokens: int
    reason: str


def reach_of(model: PreTrainedModel, decoder: str, blocks: str) -> Reach | None:
    """The bound that a whole model sets, or None if it sets none.

    Args:
        model: The model.
        decoder: Path of the module that runs its blocks.
        blocks: Name of their list in it.
    """
    bounds = _table(model.get_submodule(decoder), blocks), _frequencies(model.config)
    return min(filter(None, bounds), key=lambda reach: reach.tokens, default=None)


def _table(decoder: nn.Module, blocks: str) -> Reach | None:
    """Of a table with a row for each position, learned or computed when the model is made."""

    def is_table(name: str, depth: int) -> bool:
        """The decoder's own or its blocks', and not, say, that of an encoder of images within it."""
        return bool(_TABLE.search(name)) and (name.count(".") <= depth or name.startswith(f"{blocks}."))

    # Some leave the first rows of the table empty.
    rows = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and is_table(name, 0)
    ]
    rows += [
        len(buffer)
        for name, buffer in decoder.named_buffers()
        if is_table(name, 1) and buffer.dim() == 2 and buffer.is_floating_point()
    ]
    return Reach(min(rows), f"this model has a table of {min(rows)} positions") if rows else None


def _frequencies(config: Any) -> Reach | None:
    """Of rotary embeddings whose frequencies all change as soon as a sequence of the batch is longer than so.

    Every other sequence would change with it, keys that are kept from before would be turned by other angles than the
    queries, and some modules go on with the new frequencies afterwards.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    by_type = [one for one in settings.values() if isinstance(one, dict)] or [settings]
    context: int = getattr(config, "max_position_embeddings", 0)
    found = []
    for one in by_type:
        kind = one.get("rope_type") or "default"
        if kind == "longrope":
            original = one.get("original_max_position_embeddings")
            found.append((original or getattr(config, "original_max_position_embeddings", None) or context, kind))
        elif "dynamic" in kind:
            found.append((context, kind))
    if not found:
        return None
    tokens, kind = min(found)
    return Reach(
        tokens,
        f"this model's {kind!r} rotary embedding turns all sequences of a batch otherwise as soon as one has more than "
        f"{tokens}",
    )
