"""Greedy text from a split model, by running the whole prefix for every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsea.client.segments import ClientSegments
from fedsea.client.trunk import MicroBatch, Trunk
from fedsea.privacy.boundary import Boundary
from fedsea.types import IGNORE, TokenBatch


def greedy(
    segments: ClientSegments,
    trunk: Trunk,
    boundary: Boundary,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop: int | None = None,
) -> list[int]:
    """Continue a prompt with the likeliest token each time; there is no cache, so the cost grows with the square.

    Args:
        segments: This client's segments.
        trunk: Where hidden states go.
        boundary: Maker of releases.
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to add.
        stop: Token id that ends the text; it is not returned.

    Returns:
        The new token ids.
    """
    segments.train(False)
    ids = list(prompt)
    for number in range(max_new_tokens):
        ids_T = torch.tensor(ids)
        batch = TokenBatch(ids_T, torch.full_like(ids_T, IGNORE), (len(ids),))
        where = MicroBatch(number, 0, 0, 1, batch.lengths, 0, segments.trunk_blocks)
        sealed = trunk.seal(boundary.hidden(segments.evaluate_embed(batch)))
        hidden_TH = trunk.evaluate(where, sealed).result()
        with torch.no_grad():
            token = int(segments.output_blocks.last_logits(hidden_TH.to(segments.device), batch.lengths).argmax())
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]
