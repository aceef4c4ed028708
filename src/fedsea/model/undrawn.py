"""No initial values for parameters that have no memory: a model on the meta device is filled from a file afterwards.

Torch goes through the shapes of every such draw in Python, which is more than half of the time that a large model's
outline takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"})


class Undrawn(TorchFunctionMode):
    """While it is entered, draws into tensors of the meta device are left out; all others are made."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        settings = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            into: torch.Tensor = args[0] if args else settings["tensor"]
            if into.is_meta:
                return into
        return func(*args, **settings)
