"""Attention of new tokens to a slab's keys and values, many sequences in one call.

S  slots, M  new tokens of each, T = S M  rows, Q  query heads, N  key/value heads, C  longest so far, D  head size,
B = S N  products, R = (Q / N) M  rows of each
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fedsea.model.grouping import Run

_FEW_TOKENS = 16
"""Up to so many new tokens of a sequence plain products are faster on a CPU than torch's fused attention (1.1 to 2
times), above all where query heads share a key head."""


def attend(
    queries_TQD: torch.Tensor,
    keys_SNCD: torch.Tensor,
    values_SNCD: torch.Tensor,
    run: Run,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """What the new tokens of a run take from their pasts, [T, Q D].

    Args:
        queries_TQD: Of the run's sequences.
        keys_SNCD: All keys so far of the run's slots.
        values_SNCD: Likewise.
        run: Where they are.
        scaling: Of the scores.
        window: Most keys that a token sees; None: all.
    """
    queries_TQD = run.spread(queries_TQD)
    if run.new <= _FEW_TOKENS and queries_TQD.dtype is torch.float32 and queries_TQD.device.type == "cpu":
        return run.gather(_plain(queries_TQD, keys_SNCD, values_SNCD, run.bias(window), scaling))
    mask, causal = run.mask(window)
    mixed_SQMD = F.scaled_dot_product_attention(
        queries_TQD.reshape(run.num_slots, run.new, *queries_TQD.shape[1:]).transpose(1, 2),
        keys_SNCD,
        values_SNCD,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=queries_TQD.shape[1] != keys_SNCD.shape[1],
    )
    return run.gather(mixed_SQMD.transpose(1, 2).reshape(queries_TQD.shape[0], -1))


def _plain(
    queries_TQD: torch.Tensor,
    keys_SNCD: torch.Tensor,
    values_SNCD: torch.Tensor,
    bias_S1MC: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    num_slots, num_keys = keys_SNCD.shape[:2]
    rows, num_queries, size = queries_TQD.shape
    new, shared = rows // num_slots, num_queries // num_keys
    # Query heads that share a key head, and tokens of one sequence, are the rows of one product.
    if new == 1:
        queries_BRD = queries_TQD.reshape(num_slots * num_keys, shared, size)
    else:
        by_head = queries_TQD.reshape(num_slots, new, num_keys, shared, size).permute(0, 2, 3, 1, 4)
        queries_BRD = by_head.reshape(num_slots * num_keys, shared * new, size)
    scores_BRC = torch.bmm(queries_BRD * scaling, keys_SNCD.flatten(0, 1).transpose(1, 2))
    if bias_S1MC is not None:
        scores_BRC.view(num_slots, num_queries, new, -1).add_(bias_S1MC)
    mixed_BRD = torch.bmm(torch.softmax(scores_BRC, dim=-1), values_SNCD.flatten(0, 1))
    if new == 1:
        return mixed_BRD.view(num_slots, -1)
    by_token = mixed_BRD.view(num_slots, num_keys, shared, new, size).permute(0, 3, 1, 2, 4)
    return by_token.reshape(rows, -1)
