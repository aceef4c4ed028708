"""Derivatives of a causal segment row by row: what a row's output owes to its own input, and to nothing before it.

Inside `rows_apart`, attention has its usual values, but its gradient reaches a row's keys and values only from that
row's own query. So one backward pass gives, for all rows at once, what would else need a pass for each row.

    B  sequences, N  heads, T  rows of a sequence, D  head size, H  hidden size, C  copies
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fedsea.model.segments import OutputBlocks

_APART: ContextVar[bool] = ContextVar("fedsea_rows_apart", default=False)

_ROWS_AT_ONCE = 8192


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Gradients of attention stay within each row; the values are those of ordinary causal attention."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def are_rows_apart() -> bool:
    """Whether attention is to be `attend_own`."""
    return _APART.get()


def attend_own(
    module: nn.Module,  # noqa: ARG001 (the signature is transformers')
    query_BNTD: torch.Tensor,
    key_BNTD: torch.Tensor,
    value_BNTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal softmax attention in which each row's gradient goes to that row alone."""
    groups = query_BNTD.shape[1] // key_BNTD.shape[1]
    key_BNTD = key_BNTD.repeat_interleave(groups, dim=1)
    value_BNTD = value_BNTD.repeat_interleave(groups, dim=1)
    num_rows = query_BNTD.shape[2]
    query_BNTD = query_BNTD * (query_BNTD.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_BNTT = query_BNTD @ key_BNTD.detach().transpose(2, 3)
    own_BNT = (query_BNTD * (key_BNTD - key_BNTD.detach())).sum(-1)  # zero, but with the keys' gradient
    scores_BNTT = scores_BNTT + torch.diag_embed(own_BNT)
    if softcap is not None:
        scores_BNTT = torch.tanh(scores_BNTT / softcap) * softcap
    if attention_mask is None:
        seen_TT = torch.ones(num_rows, num_rows, dtype=torch.bool, device=scores_BNTT.device).tril()
        scores_BNTT = scores_BNTT.masked_fill(~seen_TT, -torch.inf)
    elif attention_mask.dtype == torch.bool:
        scores_BNTT = scores_BNTT.masked_fill(~attention_mask, -torch.inf)
    else:
        scores_BNTT = scores_BNTT + attention_mask
    weights_BNTT = scores_BNTT.float().softmax(-1).to(value_BNTD.dtype)
    out_BNTD = weights_BNTT @ value_BNTD.detach()
    diagonal_BNT1 = weights_BNTT.diagonal(dim1=2, dim2=3)[..., None]
    out_BNTD = out_BNTD + diagonal_BNT1 * (value_BNTD - value_BNTD.detach())
    return out_BNTD.transpose(1, 2).contiguous(), None


def own_jacobians(output_blocks: OutputBlocks, hidden_TH: torch.Tensor, start: int = 0) -> torch.Tensor:
    """How each row's final hidden state (after the last norm) changes with the same row at the segment's input.

    Args:
        output_blocks: The segment.
        hidden_TH: One sequence at its input, or the beginning of one: later rows do not matter.
        start: The first row that is wanted.

    Returns:
        [T - start, H, H]: row, input component, output component; so `[0] @ cotangent` is a gradient at the input.
    """
    num_rows, width = hidden_TH.shape
    at_once = max(1, _ROWS_AT_ONCE // num_rows)
    parts = []
    for columns_C in torch.split(torch.arange(width, device=hidden_TH.device), at_once):
        copies = len(columns_C)
        leaf_TH = hidden_TH.detach().repeat(copies, 1).requires_grad_()
        with torch.enable_grad(), rows_apart():
            out_TH = output_blocks.final(leaf_TH, (num_rows,) * copies)
        # One component of the output for each copy, the same in all its rows.
        cotangent_CTH = torch.zeros(copies, num_rows, width, device=out_TH.device, dtype=out_TH.dtype)
        cotangent_CTH[torch.arange(copies), :, columns_C] = 1.0
        (gradient_TH,) = torch.autograd.grad(out_TH, leaf_TH, cotangent_CTH.flatten(0, 1))
        parts.append(gradient_TH.view(copies, num_rows, width)[:, start:])
    return torch.cat(parts).permute(1, 2, 0).contiguous()
