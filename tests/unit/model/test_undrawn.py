"""Outlines of models draw no initial values, and nothing else about them is another."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from fedsea.model.partition import build
from fedsea.model.undrawn import Undrawn

SMALL = [
    LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2),
    GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8),
]


class _Counting(TorchDispatchMode):
    """Counts what reaches torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.model_type)
def test_an_outline_is_built_without_a_draw(config: PretrainedConfig) -> None:
    with _Counting() as counting:
        model, _ = build(config, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not [call for call in counting.calls if "normal" in call or "uniform" in call]


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.model_type)
def test_an_outline_is_the_same_as_with_draws(config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = build(config, torch.float32)
    monkeypatch.setattr("fedsea.model.undrawn._DRAWS", frozenset())
    torch.manual_seed(3)
    drawn, drawn_layout = build(config, torch.float32)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert layout == drawn_layout
    shapes, drawn_shapes = ({n: (p.shape, p.dtype) for n, p in one.named_parameters()} for one in (model, drawn))
    assert shapes == drawn_shapes
    buffers = dict(drawn.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_tensors_with_memory_are_drawn_as_ever() -> None:
    expected_N = torch.randn(4, generator=torch.Generator().manual_seed(1))
    with Undrawn():
        assert torch.equal(torch.empty(4).normal_(generator=torch.Generator().manual_seed(1)), expected_N)
        assert torch.nn.init.uniform_(tensor=torch.full((4,), 9.0)).max() <= 1.0
        assert torch.nn.init.uniform_(tensor=torch.empty(4, device="meta")).is_meta
