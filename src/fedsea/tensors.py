"""What several rooms ask of a tensor's values."""

from __future__ import annotations

import math

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass and no temporary, as long as the sum does not overflow."""
    return math.isfinite(tensor.detach().sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())
