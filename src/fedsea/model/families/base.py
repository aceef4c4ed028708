"""What a family may say about itself; the defaults fit most decoders of transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Exceptions from the generic rules of `model.partition`.

    Attributes:
        before: Children of the decoder with weights that act before the blocks, though declared after them.
        after: Children of the decoder with weights that act after the blocks, though declared before them.
        multipliers: Numbers on the decoder that scale the embedding, 1 where there is no embedding.
        refused: Why the family cannot be split, or None.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    multipliers: tuple[str, ...] = ("embedding_multiplier",)
    refused: str | None = None
