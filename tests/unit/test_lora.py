"""The fused LoRA layer gives what peft's own gives, and leaves to it what it does not cover."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from fedsea.model.lora import FusedLoraLinear, fuse


def layers(*, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ...]:
    """The same model with peft's layer and with the fused one; both adapter factors are filled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=dtype)).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6.0, lora_dropout=dropout, target_modules=["0"])
    inject_adapter_in_model(config, model)
    nn.init.normal_(model[0].lora_B["default"].weight)
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient at the input, gradients of both factors."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = model(x)
    out.float().square().sum().backward()
    factors = [p.grad for p in model.parameters() if p.requires_grad]
    return [out, x.grad, *factors]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_output_and_gradients_are_pefts(bias: bool, shape: tuple[int, ...]) -> None:
    plain, fused = layers(bias=bias)
    assert isinstance(fused[0], FusedLoraLinear)
    x = torch.randn(shape)
    for expected, found in zip(run(plain, x), run(fused, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_input_gets_no_gradient_and_the_factors_do() -> None:
    _, fused = layers()
    fused(torch.randn(3, 12)).sum().backward()
    assert all(p.grad is not None for p in fused.parameters() if p.requires_grad)


def test_gradients_of_two_batches_add_up() -> None:
    plain, fused = layers()
    x, y = torch.randn(3, 12), torch.randn(5, 12)
    for model in (plain, fused):
        run(model, x)
    for expected, found in zip(run(plain, y), run(fused, y), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["dropout", "bfloat16 weights", "autocast", "merged", "disabled"])
def test_what_is_not_covered_runs_exactly_as_in_peft(case: str) -> None:
    dtype = torch.bfloat16 if case == "bfloat16 weights" else torch.float32
    models = layers(dropout=0.5 if case == "dropout" else 0.0, dtype=dtype)
    results = []
    for model in models:
        layer = model[0]
        if case == "merged":
            layer.merge()
        if case == "disabled":
            layer.enable_adapters(False)
        precision = torch.autocast("cpu", torch.bfloat16) if case == "autocast" else contextlib.nullcontext()
        torch.manual_seed(1)
        with precision, torch.no_grad():
            results.append(model.train()(torch.ones(3, 12, dtype=dtype)))
    assert torch.equal(*results)


def test_dropout_that_is_switched_off_runs_fused() -> None:
    plain, fused = (model.eval() for model in layers(dropout=0.5))
    x = torch.randn(3, 12)
    torch.testing.assert_close(fused(x), plain(x))
    assert type(fused(x.requires_grad_()).grad_fn).__name__ == "_FusedProductBackward"


def test_names_and_parameters_stay() -> None:
    plain, fused = layers()
    assert list(plain.state_dict()) == list(fused.state_dict())


def test_layers_over_other_modules_stay_pefts() -> None:
    model = nn.Sequential(nn.Embedding(5, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    before = type(model[0])
    fuse(model)
    assert type(model[0]) is before is not LoraLinear
