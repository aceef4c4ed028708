"""The language-model head of any family, and its loss without ever holding all logits.

The head is the family's own `*ForCausalLM.forward` with the decoder taken out, so logit scaling, soft-capping
and biases are the family's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

CHUNK_ELEMENTS = 6 * 2**20
"""Logits held at once (rows times V) on a CPU: 25 MB in float32, since glibc maps what is over 32 MB anew each time."""

_ON_ACCELERATORS = 4
"""So many times as many on other devices, which want larger products and keep their memory."""


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """Answers None for whatever else a family reads from its decoder's output."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _PassThrough(nn.Module):
    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_kwargs: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def head_of(
    model: PreTrainedModel, decoder_path: str, linear: nn.Module | None = None
) -> tuple[Logits, list[nn.Parameter]]:
    """The head of a model, and its trainable parameters.

    It is made anew for each use: adapters may replace modules of the model at any time.

    Args:
        model: A `*ForCausalLM`, whole or cut.
        decoder_path: Where its decoder is.
        linear: Takes the place of its output embedding in the function.

    Returns:
        Function from final hidden states [T, H] to logits [T, V], and the parameters that it uses and that are trained.
    """
    head = copied = copy.copy(model)
    path = decoder_path.split(".")
    for depth, name in enumerate(path):
        copied.__dict__["_modules"] = dict(copied._modules)
        inner = _PassThrough() if depth == len(path) - 1 else copy.copy(copied._modules[name])
        copied._modules[name] = inner
        assert inner is not None
        copied = inner
    if linear is not None:
        replaced = model.get_output_embeddings()
        head._modules |= {name: linear for name, module in head._modules.items() if module is replaced}

    def logits(hidden_TH: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = head(inputs_embeds=hidden_TH[None], use_cache=False, return_dict=True).logits
        return out.squeeze(0)  # not out[0], whose backward would fill and copy a tensor of this size

    return logits, [parameter for parameter in head.parameters() if parameter.requires_grad]


def summed_cross_entropy(
    logits: Logits, trained: list[nn.Parameter], hidden_TH: torch.Tensor, targets_T: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Sum of the cross entropy over rows that all have a target, in float32.

    Args:
        logits: The head.
        trained: Its trainable parameters.
        hidden_TH: Final hidden states.
        targets_T: A target for each of them.
        vocab_size: V, which decides how many rows run at once.
    """
    elements = CHUNK_ELEMENTS * (1 if hidden_TH.device.type == "cpu" else _ON_ACCELERATORS)
    rows = max(1, elements // vocab_size)
    if torch.is_grad_enabled() and (hidden_TH.requires_grad or trained):
        loss: torch.Tensor = _ChunkedLoss.apply(logits, rows, targets_T, hidden_TH, *trained)  # type: ignore[no-untyped-call]
        return loss
    total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
    for part_TH, targets in zip(torch.split(hidden_TH, rows), torch.split(targets_T, rows), strict=True):
        total += F.cross_entropy(logits(part_TH).float(), targets, reduction="sum")
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradient chunk by chunk in the forward pass, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Logits, rows: int, targets_T: torch.Tensor, hidden_TH: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        hidden_gradients, gradients = [], [torch.zeros_like(parameter) for parameter in trained]
        for part_TH, targets in zip(torch.split(hidden_TH, rows), torch.split(targets_T, rows), strict=True):
            with torch.enable_grad():
                leaf_TH = part_TH.detach().requires_grad_()
                logits_TV = logits(leaf_TH)
            # By hand: the gradient of the cross entropy is the probabilities, which take the place of their logs.
            gradient_TV = F.log_softmax(logits_TV.detach(), dim=-1, dtype=torch.float32)
            total -= gradient_TV.gather(1, targets[:, None]).sum()
            gradient_TV.exp_().scatter_add_(1, targets[:, None], gradient_TV.new_full((len(targets), 1), -1.0))
            # A trained parameter of the model's outside that this head does not use gets no gradient here.
            own, *others = torch.autograd.grad(
                logits_TV, [leaf_TH, *trained], gradient_TV.to(logits_TV.dtype), allow_unused=True
            )
            del logits_TV, gradient_TV  # before the next chunk's are made
            hidden_gradients.append(own)
            for so_far, gradient in zip(gradients, others, strict=True):
                if gradient is not None:
                    so_far += gradient
        ctx.gradients = (torch.cat(hidden_gradients), *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        scaled = (g * scale[0].to(g.dtype) if wanted else None for g, wanted in zip(ctx.gradients, needed, strict=True))
        return (None, None, None, *scaled)
