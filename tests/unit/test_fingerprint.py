"""Fingerprints tell base models apart unit by unit, and nothing else."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from fedsea.errors import ConfigError
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.fingerprint import check, fingerprint, units_of
from fedsea.model.layout import unit_of
from fedsea.types import Partition, SegmentKind

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 32}


class Fake:
    """A checkpoint in memory that records what is read."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
        self.config = LlamaConfig(**{**SIZES, **changes})
        self.folder = folder
        self.tensors = tensors
        self.was_read: list[str] = []

    @property
    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            self.was_read.append(name)
            yield name, self.tensors[name]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {unit for unit in one.keys() | other.keys() if one.get(unit) != other.get(unit)}


def test_every_unit_has_a_hash(folder: Path) -> None:
    found = fingerprint(Fake(folder, tensors()))
    assert list(found) == ["config", "tokenizer", "embedding", "block.0", "block.1", "block.2", "norm", "head"]
    assert all(len(value) == 64 for value in found.values())
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.self_attn.q_proj.weight", "block.1"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
    ],
)
def test_one_changed_bit_changes_its_unit_alone(folder: Path, name: str, unit: str) -> None:
    changed = tensors()
    changed[name].view(torch.int32).view(-1)[3] ^= 1
    assert differing(fingerprint(Fake(folder, tensors())), fingerprint(Fake(folder, changed))) == {unit}


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_dtype_shape_and_name_count_too(folder: Path, change: str) -> None:
    changed = tensors()
    weight = changed.pop("model.layers.0.self_attn.q_proj.weight").zero_()
    if change == "dtype":
        weight = weight.view(torch.int32)
    name = "q" if change == "name" else "q_proj"
    changed[f"model.layers.0.self_attn.{name}.weight"] = weight.view(8, 32) if change == "shape" else weight
    original = tensors()
    original["model.layers.0.self_attn.q_proj.weight"].zero_()
    assert differing(fingerprint(Fake(folder, original)), fingerprint(Fake(folder, changed))) == {"block.0"}


def test_the_order_in_which_tensors_are_read_does_not_matter(folder: Path) -> None:
    backwards = dict(reversed(tensors().items()))
    assert fingerprint(Fake(folder, tensors())) == fingerprint(Fake(folder, backwards))


def test_only_the_asked_units_are_read(folder: Path) -> None:
    checkpoint = Fake(folder, tensors())
    whole = fingerprint(Fake(folder, tensors()))
    assert fingerprint(checkpoint, ["config", "block.1"]) == {unit: whole[unit] for unit in ("config", "block.1")}
    assert checkpoint.was_read
    assert all(name.startswith("model.layers.1.") for name in checkpoint.was_read)


def test_a_tied_head_that_is_not_stored_is_the_embedding(folder: Path) -> None:
    values = tensors()
    del values["lm_head.weight"]
    found = fingerprint(Fake(folder, values, tie_word_embeddings=True))
    assert found["head"] == found["embedding"]
    assert fingerprint(Fake(folder, values, tie_word_embeddings=True), ["head"]) == {"head": found["head"]}


def test_a_stored_head_counts_even_if_the_config_ties_it(folder: Path) -> None:
    changed = tensors()
    changed["lm_head.weight"] += 1
    one, other = (fingerprint(Fake(folder, values, tie_word_embeddings=True)) for values in (tensors(), changed))
    assert differing(one, other) == {"head"}


def test_an_untied_checkpoint_without_a_head_is_an_error(folder: Path) -> None:
    values = tensors()
    del values["lm_head.weight"]
    with pytest.raises(ConfigError, match="no tensors of 'head'"):
        fingerprint(Fake(folder, values), ["head"])


def test_where_and_by_what_a_config_was_saved_does_not_matter(folder: Path) -> None:
    plain = fingerprint(Fake(folder, {}), ["config"])
    moved = Fake(folder, {}, dtype="bfloat16", _name_or_path="elsewhere", use_cache=False, transformers_version="5.0")
    assert fingerprint(moved, ["config"]) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 4},
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_a_change_of_architecture_changes_the_config_s_hash(folder: Path, change: dict[str, Any]) -> None:
    assert fingerprint(Fake(folder, {}), ["config"]) != fingerprint(Fake(folder, {}, **change), ["config"])


def test_another_family_of_the_same_sizes_has_another_config_hash(folder: Path) -> None:
    gpt2 = SimpleNamespace(config=GPT2Config(), folder=folder, tensor_names=[], read=None)
    assert fingerprint(gpt2, ["config"]) != fingerprint(Fake(folder, {}), ["config"])  # type: ignore[arg-type]


def test_the_tokenizer_counts_if_it_is_there(folder: Path) -> None:
    before = fingerprint(Fake(folder, {}), ["tokenizer"])
    (folder / "merges.txt").write_text("not read beside tokenizer.json")
    assert fingerprint(Fake(folder, {}), ["tokenizer"]) == before
    (folder / "tokenizer.json").write_text("[]")
    assert fingerprint(Fake(folder, {}), ["tokenizer"]) != before
    (folder / "tokenizer.json").unlink()
    assert fingerprint(Fake(folder, {}), ["tokenizer"]) == {}


def test_a_pair_of_tokenizer_files_counts_as_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    before = fingerprint(Fake(folder, {}), ["tokenizer"])
    (folder / "merges.txt").write_text("a c")
    assert before.keys() == {"tokenizer"}
    assert fingerprint(Fake(folder, {}), ["tokenizer"]) != before


def test_a_real_checkpoint_in_shards_equals_the_same_in_one_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    one, many = (open_checkpoint(str(tmp_path / name)) for name in ("one", "many"))
    assert len(set(many.files.values())) > 1
    assert fingerprint(one) == fingerprint(many)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("transformer.wte.weight", "embedding"),
        ("wpe.weight", "embedding"),
        ("transformer.word_embeddings_layernorm.bias", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("model.decoder.embed_positions.weight", "embedding"),
        ("model.decoder.project_in.weight", "embedding"),
        ("h.11.mlp.c_fc.weight", "block.11"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "block.3"),
        ("transformer.ln_f.weight", "norm"),
        ("gpt_neox.final_layer_norm.bias", "norm"),
        ("model.decoder.project_out.weight", "norm"),
        ("embed_out.weight", "head"),
        ("lm_head.bias", "head"),
        ("transformer.output_layer.weight", "head"),
    ],
)
def test_names_of_many_families_fall_into_units(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_the_units_of_the_segments_cover_the_model(folder: Path) -> None:
    partition = Partition(1, 1)
    by_kind = {kind: units_of(kind, partition, 3) for kind in SegmentKind}
    assert by_kind[SegmentKind.INPUT] == ("config", "tokenizer", "embedding", "block.0")
    assert by_kind[SegmentKind.TRUNK] == ("config", "block.1")
    assert by_kind[SegmentKind.OUTPUT] == ("config", "tokenizer", "block.2", "norm", "head")
    assert {unit for units in by_kind.values() for unit in units} == set(fingerprint(Fake(folder, tensors())))


def test_check_names_the_units_that_differ() -> None:
    expected = {"config": "a", "block.0": "b", "block.1": "c"}
    check(expected, {"config": "a", "block.0": "b"})
    with pytest.raises(ConfigError, match=r"block\.0, block\.2 differ\. Use the same model and revision"):
        check(expected, {"config": "a", "block.0": "x", "block.2": "y"})


def test_check_passes_what_was_not_pinned() -> None:
    check({}, {"config": "a"})
    check({"config": "a"}, {"config": "a", "tokenizer": "t"})
