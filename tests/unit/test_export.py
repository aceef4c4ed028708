"""Exports load in peft and transformers without a warning and give the trained model's numbers."""

import json
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedsea.errors import ConfigError, StorageError
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.model.export import write_adapter, write_merged
from fedsea.plan import AdapterSection
from fedsea.types import SegmentKind

IDS = torch.arange(12)[None]


class Whole:
    """A whole model in the place of a segment."""

    kind = SegmentKind.OUTPUT

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model


def save_base(folder: Path, family: str = "llama", **changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 3, "vocab_size": 64, **changes}))
    elif family == "glm4_moe":  # its dense and shared layers are called as its experts were
        config = Glm4MoeConfig(
            hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
            vocab_size=64,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    else:
        # Square projections: whether a weight is transposed cannot be told from its shape.
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_inner=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)
        )
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


def base(checkpoint: Checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder)


def trained(
    checkpoint: Checkpoint, settings: AdapterSection, keep: Any = lambda name: True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """LoRA factors as after training (those with `keep(name)`, zeros elsewhere), and the model's logits with them."""
    part = Whole(base(checkpoint))
    adapters.attach(part, settings, "adapter", seed=3)
    generator = torch.Generator().manual_seed(4)
    values = {}
    for name, tensor in adapters.read(part).items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.3
        values[name] = (tensor + noise) if keep(name) else torch.zeros_like(tensor)
    adapters.load(part, values)
    with torch.no_grad():
        return {name: tensor for name, tensor in values.items() if keep(name)}, part.model.eval()(IDS).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load_with_peft(checkpoint: Checkpoint, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers themselves
        return PeftModel.from_pretrained(base(checkpoint), folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_loads_in_peft_with_the_same_numbers(tmp_path: Path, family: str) -> None:
    checkpoint, settings = save_base(tmp_path / "base", family), AdapterSection(rank=4, alpha=6.0)
    tensors, expected = trained(checkpoint, settings)
    write_adapter(tmp_path / "out", tensors, settings, checkpoint.config, "some/base", {"run": "x"})
    model = load_with_peft(checkpoint, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert (logits(base(checkpoint)) - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["lora_alpha"], config["task_type"]) == (
        "some/base",
        6,
        "CAUSAL_LM",
    )
    assert json.loads((tmp_path / "out" / "fedsea.json").read_text()) == {"run": "x"}


def test_an_adapter_on_all_blocks_names_plain_targets(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base"), AdapterSection(rank=4)
    tensors, _ = trained(checkpoint, settings)
    write_adapter(tmp_path / "out", tensors, settings, checkpoint.config, "base", {})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == leaves
    assert config["layers_to_transform"] is None


@pytest.mark.parametrize(
    ("family", "targets", "keep"),
    [
        ("llama", "all-linear", lambda name: "layers.1." not in name),
        ("llama", "all-linear", lambda name: ("layers.0." in name) == ("q_proj" in name)),
        ("llama", ("q_proj", "lm_head"), lambda name: "layers.2." not in name),
        ("gpt2", ("attn.c_proj",), lambda name: True),
        ("glm4_moe", "all-linear", lambda name: "layers.1." not in name),
    ],
    ids=["some blocks", "unlike blocks", "head", "one of two modules of a name", "experts"],
)
def test_a_partial_adapter_lacks_no_key_in_peft(tmp_path: Path, family: str, targets: Any, keep: Any) -> None:
    checkpoint, settings = save_base(tmp_path / "base", family), AdapterSection(rank=4, targets=targets)
    tensors, expected = trained(checkpoint, settings, keep)
    write_adapter(tmp_path / "out", tensors, settings, checkpoint.config, "base", {})
    model = load_with_peft(checkpoint, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default.", ".") for name in adapted} == {"base_model.model." + name for name in tensors}


def test_full_training_cannot_become_an_adapter(tmp_path: Path) -> None:
    checkpoint = save_base(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"lm_head\.weight was trained in full.*merged"):
        write_adapter(
            tmp_path / "out", {"lm_head.weight": torch.zeros(64, 32)}, AdapterSection(), checkpoint.config, "b", {}
        )


def test_factors_of_another_model_or_rank_are_refused(tmp_path: Path) -> None:
    checkpoint = save_base(tmp_path / "base")
    tensors, _ = trained(checkpoint, AdapterSection(rank=4))
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        write_adapter(tmp_path / "out", tensors, AdapterSection(rank=8), checkpoint.config, "b", {})
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ConfigError, match="do not fit the base model"):
        write_merged(tmp_path / "out", checkpoint, tensors, AdapterSection(rank=4), torch.float32)
    with pytest.raises(ConfigError, match="nothing to export"):
        write_adapter(tmp_path / "out", {}, AdapterSection(), checkpoint.config, "b", {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shard_bytes", [20_000, 1 << 30], ids=["shards", "one file"])
def test_a_merged_model_loads_in_transformers_with_the_same_numbers(
    tmp_path: Path, family: str, shard_bytes: int
) -> None:
    checkpoint, settings = save_base(tmp_path / "base", family), AdapterSection(rank=4, alpha=6.0)
    tensors, expected = trained(checkpoint, settings)
    write_merged(tmp_path / "out", checkpoint, tensors, settings, torch.float32, shard_bytes)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes > 100_000)
    torch.testing.assert_close(logits(base(open_checkpoint(str(tmp_path / "out")))), expected, rtol=0, atol=1e-5)


def test_a_merged_model_has_the_asked_dtype_and_the_base_s_tokenizer(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base"), AdapterSection(rank=4)
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    write_merged(tmp_path / "out", checkpoint, trained(checkpoint, settings)[0], settings, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_fully_trained_parameters_replace_the_base_s(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base"), AdapterSection(input="full")
    tensors = {"model.embed_tokens.weight": torch.ones(64, 32), "lm_head.weight": torch.full((64, 32), 2.0)}
    write_merged(tmp_path / "out", checkpoint, tensors, settings, torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = dict(checkpoint.read(checkpoint.tensor_names))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensors.get(name, original[name])) for name in written)


def test_experts_that_were_trained_as_one_tensor_are_written_as_the_base_stores_them(tmp_path: Path) -> None:
    checkpoint = save_base(tmp_path / "base", "glm4_moe")
    model = base(checkpoint)
    tensors = {name: p for name, p in model.named_parameters() if ".layers.2." in name or name.startswith("lm_head")}
    assert any(name not in checkpoint.files for name in tensors)
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    settings = AdapterSection(output="full")
    write_merged(tmp_path / "out", checkpoint, {n: p.detach() for n, p in tensors.items()}, settings, torch.float32)
    merged = open_checkpoint(str(tmp_path / "out"))
    assert merged.files.keys() == checkpoint.files.keys()
    torch.testing.assert_close(logits(base(merged)), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_trained_copy_of_a_tied_weight_is_written_apart(tmp_path: Path, name: str) -> None:
    checkpoint = save_base(tmp_path / "base", tie_word_embeddings=True)
    write_merged(tmp_path / "out", checkpoint, {name: torch.ones(64, 32)}, AdapterSection(input="full"), torch.float32)
    model = base(open_checkpoint(str(tmp_path / "out")))
    original = dict(checkpoint.read(["model.embed_tokens.weight"]))["model.embed_tokens.weight"]
    for found, weight in (
        ("model.embed_tokens.weight", model.model.embed_tokens.weight),
        ("lm_head.weight", model.lm_head.weight),
    ):
        assert torch.equal(weight, torch.ones(64, 32) if found == name else original)


def test_a_tied_model_stays_tied_when_only_adapters_were_trained(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base", tie_word_embeddings=True), AdapterSection(rank=4)
    write_merged(tmp_path / "out", checkpoint, trained(checkpoint, settings)[0], settings, torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_base_stored_without_the_prefix_of_the_whole_model_merges(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base", "gpt2"), AdapterSection(rank=4)
    tensors, expected = trained(checkpoint, settings)
    stored = load_file(checkpoint.folder / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(stripped, checkpoint.folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(checkpoint.folder))
    write_merged(tmp_path / "out", checkpoint, tensors, settings, torch.float32)
    torch.testing.assert_close(logits(base(open_checkpoint(str(tmp_path / "out")))), expected, rtol=0, atol=1e-5)


def test_a_trained_tensor_without_a_place_in_the_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = save_base(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"stores no model\.extra\.weight"):
        write_merged(
            tmp_path / "out", checkpoint, {"model.extra.weight": torch.zeros(1)}, AdapterSection(), torch.float32
        )


def test_an_existing_export_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base"), AdapterSection(rank=4)
    tensors, _ = trained(checkpoint, settings)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is not empty: remove it, or choose another folder"):
        write_adapter(tmp_path / "out", tensors, settings, checkpoint.config, "b", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


class Failing(Checkpoint):
    """A checkpoint on a disk that fails in the middle."""

    def read(self, names: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for count, item in enumerate(super().read(names)):
            if count == 5:
                raise OSError(28, "No space left on device")
            yield item


def test_a_failed_export_leaves_no_folder(tmp_path: Path) -> None:
    good, settings = save_base(tmp_path / "base"), AdapterSection(rank=4)
    tensors, _ = trained(good, settings)
    bad = Failing(good.config, good.folder, good.files)
    with pytest.raises(StorageError, match="the disk is full"):
        write_merged(tmp_path / "out", bad, tensors, settings, torch.float32, 20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_export_is_as_readable_as_other_new_files(tmp_path: Path) -> None:
    checkpoint, settings = save_base(tmp_path / "base"), AdapterSection(rank=4)
    write_adapter(tmp_path / "out", trained(checkpoint, settings)[0], settings, checkpoint.config, "b", {})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}
