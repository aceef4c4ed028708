"""peft's LoRA layer with the adapter's products added into the base layer's, instead of beside them.

peft computes `base(x) + B(A(x)) * scaling`: two more tensors of the output's size and two more passes over them in
each direction, about a tenth of a small model's training step. Here the low-rank product is accumulated into the base
layer's output, and likewise in the backward pass; values agree to the last bits of float32.

    T  rows, I  fan in, O  fan out, R  rank
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FusedLoraLinear(LoraLinear):  # type: ignore[misc]
    """A `peft.tuners.lora.Linear`; whatever the fused product does not cover runs as in peft.

    Made out of peft's own layers by `fuse`.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the adapter's."""
        name = self._fusable(x) if not (args or kwargs) else None
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        out: torch.Tensor = _FusedProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return out

    def _fusable(self, x: torch.Tensor) -> str | None:
        """The adapter to run fused, or None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        base = self.base_layer
        if name not in self.lora_A or base.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return None
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        # Lower precision would round the accumulated product otherwise than peft does.
        dtypes = {x.dtype, base.weight.dtype, self.lora_A[name].weight.dtype}
        return name if dtypes == {torch.float32} else None


def fuse(model: nn.Module) -> None:
    """Turn every plain LoRA layer over an `nn.Linear` into a fused one, in place; names and parameters stay."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.__class__ = FusedLoraLinear


class _FusedProduct(torch.autograd.Function):
    """x Wᵀ + bias + s (x Aᵀ) Bᵀ, with a frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = F.linear(x_TI, a_RI).mul_(scaling)
        out_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b_OR.t())
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, low_TR)
        ctx.scaling = scaling
        return out_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        low_gradient_TR = torch.mm(gradient_TO, b_OR).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.mm(gradient_TO, weight_OI).addmm_(low_gradient_TR, a_RI)
            x_gradient = x_gradient.view(*gradient.shape[:-1], -1)
        a_gradient = torch.mm(low_gradient_TR.t(), x_TI) if ctx.needs_input_grad[3] else None
        # This way round it takes a third of the time of the transposed product.
        b_gradient = torch.mm(low_TR.t(), gradient_TO).t() if ctx.needs_input_grad[4] else None
        return x_gradient, None, None, a_gradient, b_gradient, None
