"""Queries scaled by how far on in their sequence they are, as in the blocks of Llama 4 that turn them by no angle.

The family takes a row's number for its position, which in a pack, or with a past that is kept here, it is not. So its
own scaling is switched off, and done where attention has each sequence's rows before it.

    B  sequences, N  heads, T  queries of a sequence, D  head size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Temperature:
    """Scale of a query: 1 + attn_scale · log(1 + ⌊(position + 1) / floor_scale⌋).

    Attributes:
        floor_scale: Tokens after which the scale changes.
        attn_scale: How much.
    """

    floor_scale: float
    attn_scale: float

    def scaled(self, query_BNTD: torch.Tensor, start: int) -> torch.Tensor:
        """Queries of positions from `start` on, in the order and precision of the family's own arithmetic."""
        positions_T = torch.arange(start, start + query_BNTD.shape[2], device=query_BNTD.device).float()
        scales_T = torch.log1p(torch.floor((positions_T + 1.0) / self.floor_scale)) * self.attn_scale + 1.0
        return (query_BNTD * scales_T[:, None]).to(query_BNTD.dtype)

    def before(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """Attention whose queries, the last ones of its keys, are scaled before."""

        def scaling(
            module: nn.Module, query_BNTD: torch.Tensor, key_BNSD: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            start = key_BNSD.shape[2] - query_BNTD.shape[2]
            return attention(module, self.scaled(query_BNTD, start), key_BNSD, *args, **kwargs)

        return scaling


def take_over(model: nn.Module) -> None:
    """Let every attention module of a model that would scale its queries leave it to `of`, in place."""
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", False):
            floor_scale, attn_scale = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]
            module._temperature = Temperature(floor_scale, attn_scale)  # type: ignore[assignment]
            module.attn_temperature_tuning = False  # type: ignore[assignment]


def of(module: nn.Module) -> Temperature | None:
    """What `take_over` has left to be done for an attention module."""
    found: Temperature | None = module.__dict__.get("_temperature")
    return found
