"""What is decoded with caches follows whatever became of the layers since: training, freezing, adapters of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedsea.client import setup
from fedsea.client.causal_lm import SplitCausalLM
from fedsea.client.decoding import SplitDecoder
from fedsea.client.local_trunk import LocalTrunk
from fedsea.model import adapters, products
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.plan import parse_plan
from fedsea.privacy.boundary import Boundary
from tests.support.decoding import family_checkpoint, prompt_of

FULL = {"input": "full", "output": "full", "trunk": "frozen"}


@pytest.fixture(autouse=True, params=[False, True], ids=["packed", "transposed"])
def _copies_of_small_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large weights are treated: copies for one row and for several."""
    monkeypatch.setattr(products, "_OWN_CACHE_BYTES", 64)
    monkeypatch.setattr(products, "_likes_columns", lambda: request.param)


def split_model(folder: Path, adapter: dict[str, str], family: str = "llama", **changes: Any) -> SplitCausalLM:
    family_checkpoint(folder, family, **changes)
    plan = parse_plan(
        {
            "model": {"path": str(folder)},
            "partition": {"input_blocks": 1, "output_blocks": 2},
            "clients": [{"name": "a"}],
            "adapter": adapter,
        }
    )
    checkpoint = open_checkpoint(str(folder))
    blocks = plan.partition_of("a").trunk(checkpoint.num_blocks)
    trunk = load_trunk(checkpoint, blocks, dtype=torch.float32)
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    segments = setup.load_segments(plan, checkpoint, "a", "cpu")
    segments.train(False)
    decoder = SplitDecoder(plan, segments, LocalTrunk(trunk, plan, "a"), Boundary("trusted-server"))
    return SplitCausalLM(decoder, checkpoint.config)


def moved(parameters: Any, seed: int) -> None:
    """Every value goes somewhere else, in place, as an optimiser moves it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def check(model: Any, inner: SplitCausalLM) -> torch.Tensor:
    """Cached and uncached decoding agree, token by token; returns the logits."""
    ids = torch.tensor([prompt_of(9)])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(input_ids=ids, **settings)
        whole = model.generate(input_ids=ids, use_cache=False, **settings)
        logits = inner(input_ids=ids).logits
        with inner.new_cache() as cache:
            torch.testing.assert_close(inner(input_ids=ids, cache=cache).logits, logits, rtol=1e-4, atol=1e-4)
    assert cached.tolist() == whole.tolist()
    return logits


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})])
def test_segments_that_are_trained_in_full(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = split_model(tmp_path, FULL, family, **changes)
    before = check(model, model)
    for segment in (model.decoder.segments.input_blocks, model.decoder.segments.output_blocks):
        adapters.load(segment, {name: t + 0.2 * torch.randn_like(t) for name, t in adapters.read(segment).items()})
    assert not torch.allclose(check(model, model), before)


def test_weights_that_are_frozen_thawed_trained_and_frozen_again(tmp_path: Path) -> None:
    model = split_model(tmp_path, FULL)
    model.requires_grad_(False)
    before = check(model, model)  # from here on there are copies for one row and for several
    model.requires_grad_(True)
    moved(model.parameters(), seed=3)
    after = check(model, model)
    assert not torch.allclose(after, before)
    model.requires_grad_(False)
    torch.testing.assert_close(check(model, model), after)


def test_adapters_that_others_put_on_and_switch_off(tmp_path: Path) -> None:
    inner = split_model(tmp_path, {"input": "frozen", "output": "frozen", "trunk": "adapter"})
    before = check(inner, inner)
    model = get_peft_model(inner, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    moved((p for name, p in model.named_parameters() if "lora_B" in name), seed=2)
    assert not torch.allclose(check(model, inner), before)
    with model.disable_adapter():
        torch.testing.assert_close(check(model, inner), before)
    model.merge_adapter()
    merged = check(model, inner)
    model.unmerge_adapter()
    torch.testing.assert_close(check(model, inner), merged, rtol=1e-3, atol=1e-3)
