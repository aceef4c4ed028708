"""Bounds on what one unit can change: each token's row, or all rows of a sequence together, to an L2 norm.

T  rows of a release, H  hidden size, B  sequences
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_MARGIN = 1.0 - 2.0**-16
"""The products are rounded to float32: what comes out stays under the bound by more than that."""

_LEAST = 2.0**-126
"""Smaller factors, which a server's own huge gradients may ask for, are not precise in float32: nothing is left."""


def clip_rows(values_TH: torch.Tensor, bound: float) -> torch.Tensor:
    """Each row scaled down to at most `bound`; float32."""
    values_TH = values_TH.detach().float()
    return values_TH * _scales(_norms(values_TH), bound)[:, None]


def clip_sequences(values_TH: torch.Tensor, lengths: Sequence[int], bound: float) -> torch.Tensor:
    """Each sequence's rows scaled down by one factor, so that their Frobenius norm is at most `bound`; float32."""
    values_TH = values_TH.detach().float()
    lengths_B = torch.tensor(lengths, device=values_TH.device)
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=values_TH.device), lengths_B)
    squares_B = torch.zeros(len(lengths), dtype=torch.float64, device=values_TH.device)
    squares_B.index_add_(0, sequence_T, _norms(values_TH).square())
    scales_B = _scales(squares_B.sqrt(), bound)
    return values_TH * scales_B[sequence_T][:, None]


def clip_together(tensors: Mapping[str, torch.Tensor], bound: float) -> dict[str, torch.Tensor]:
    """Several tensors scaled down by one factor, so that the norm over all their values is at most `bound`; float32."""
    values = {name: tensor.detach().float() for name, tensor in tensors.items()}
    squares = [torch.linalg.vector_norm(tensor, dtype=torch.float64).square().cpu() for tensor in values.values()]
    if not squares:
        return values
    scale = float(_scales(torch.stack(squares).sum().sqrt(), bound))
    return {name: tensor * scale for name, tensor in values.items()}


def _norms(values_TH: torch.Tensor) -> torch.Tensor:
    norms_T: torch.Tensor = torch.linalg.vector_norm(values_TH, dim=1, dtype=torch.float64)
    return norms_T


def _scales(norms: torch.Tensor, bound: float) -> torch.Tensor:
    scales = (bound * _MARGIN / norms).clamp_max(1.0)  # 0 rows: infinity, which becomes 1
    return torch.where(scales < _LEAST, 0.0, scales).float()
