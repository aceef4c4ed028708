"""A checkpoint is opened without reading weights, a segment reads its own alone, and damage has a name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea.errors import ConfigError
from fedsea.model import architecture
from fedsea.model import checkpoint as checkpoint_module
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.types import BlockRange, Partition

F32 = torch.float32
NUM_BLOCKS = 5
CUT = Partition(1, 2)
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
}


def write(folder, model_type="llama", tied=False, **saving):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, tie_word_embeddings=tied, **TINY)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **saving)
    return str(folder)


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that are read, and files that are opened."""
    seen, real = [], checkpoint_module.safe_open

    class Spy:
        def __init__(self, path, framework):
            self.path, self.handle = path, real(path, framework=framework)

        def __enter__(self):
            self.inside = self.handle.__enter__()
            return self

        def __exit__(self, *error):
            return self.handle.__exit__(*error)

        def keys(self):
            return self.inside.keys()

        def get_tensor(self, name):
            seen.append((name, self.path.name))
            return self.inside.get_tensor(name)

    monkeypatch.setattr(checkpoint_module, "safe_open", Spy)
    return seen


def test_a_model_that_was_opened_before_is_not_outlined_again_and_another_one_is(tmp_path, monkeypatch):
    built, build = [], architecture.build
    monkeypatch.setattr(architecture, "build", lambda config, dtype: built.append(config) or build(config, dtype))
    architecture._described.cache_clear()
    for tied in (False, True):
        folder = write(tmp_path / str(tied), tied=tied)
        assert open_checkpoint(folder).config.tie_word_embeddings is tied
        open_checkpoint(folder)
    assert [config.tie_word_embeddings for config in built] == [False, True]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "20KB"}], ids=["one_file", "sharded"])
def test_a_segment_reads_only_its_own_tensors(tmp_path, reads, model_type, saving):
    checkpoint = open_checkpoint(write(tmp_path, model_type, **saving))
    assert reads == []
    expected = {
        load_input_blocks: lambda name: "embed_tokens" in name or "layers.0." in name,
        load_output_blocks: lambda name: re.search(r"layers\.[34]\.|model\.norm|lm_head", name),
    }
    for load, belongs in expected.items():
        reads.clear()
        load(checkpoint, CUT, dtype=F32)
        names = [name for name, _ in reads]
        assert sorted(names) == sorted(filter(belongs, checkpoint.tensor_names))
    reads.clear()
    load_trunk(checkpoint, BlockRange(1, 3), dtype=F32)
    assert sorted(n for n, _ in reads) == [n for n in checkpoint.tensor_names if re.search(r"layers\.[12]\.", n)]


def test_a_missing_shard_matters_only_to_who_needs_it(tmp_path):
    write(tmp_path, max_shard_size="20KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {file for name, file in files.items() if "layers.4" in name or "lm_head" in name}:
        if not any("layers.2." in name for name, other in files.items() if other == file):
            (tmp_path / file).unlink()
    checkpoint = open_checkpoint(str(tmp_path))
    load_trunk(checkpoint, BlockRange(2, 3), dtype=F32)
    with pytest.raises(ConfigError, match="is missing, but this segment needs tensors of it"):
        load_output_blocks(checkpoint, CUT, dtype=F32)


@pytest.mark.parametrize("tied", [True, False])
def test_server_holds_no_embedding_or_head_and_client_no_trunk(tmp_path, tied):
    checkpoint = open_checkpoint(write(tmp_path, tied=tied))
    first = load_input_blocks(checkpoint, CUT, dtype=F32)
    trunk = load_trunk(checkpoint, CUT.trunk(NUM_BLOCKS), dtype=F32)
    last = load_output_blocks(checkpoint, CUT, dtype=F32)
    names = {kind: set(s.model.state_dict()) for kind, s in (("first", first), ("trunk", trunk), ("last", last))}
    assert {name.split(".")[2] for name in names["trunk"]} == {"1", "2"}
    assert {name for name in names["first"] | names["last"] if re.search(r"layers\.[12]\.", name)} == set()
    assert "model.embed_tokens.weight" in names["first"]
    assert {"model.norm.weight", "lm_head.weight"} <= names["last"]
    whole = AutoModelForCausalLM.from_config(checkpoint.config)
    assert names["first"] | names["trunk"] | names["last"] == set(whole.state_dict())
    doubled = last.model.lm_head.weight.numel() if tied else 0
    held = first.num_parameters + trunk.num_parameters + last.num_parameters
    assert held == sum(p.numel() for p in whole.parameters()) + doubled


def test_a_partition_without_trunk_is_refused_before_anything_is_read(tmp_path, reads):
    checkpoint = open_checkpoint(write(tmp_path))
    for load in (load_input_blocks, load_output_blocks):
        with pytest.raises(ConfigError, match="leave no trunk"):
            load(checkpoint, Partition(3, 2), dtype=F32)
    with pytest.raises(ConfigError, match="a model of 5 blocks"):
        load_trunk(checkpoint, BlockRange(1, 6), dtype=F32)
    assert reads == []


def test_a_checkpoint_saved_without_the_base_prefix_loads(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    trunk = load_trunk(open_checkpoint(str(tmp_path)), BlockRange(1, 2), dtype=F32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(trunk.model.state_dict()[name], tensors[name])


def test_local_folders_never_touch_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    open_checkpoint(write(tmp_path))
    with pytest.raises(ConfigError, match="There is no folder"):
        open_checkpoint(str(tmp_path / "absent"))


def test_a_hub_id_asks_for_the_revision_and_no_pickles(tmp_path, monkeypatch):
    folder = write(tmp_path)
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return folder

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    assert open_checkpoint("someone/llama", revision="v2").num_blocks == NUM_BLOCKS
    assert (asked["repo"], asked["revision"]) == ("someone/llama", "v2")
    assert not any("bin" in pattern or "*.pt" in pattern for pattern in asked["patterns"])


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    with pytest.raises(ConfigError, match="the hub did not give a model"):
        open_checkpoint("someone/llama")


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE = {
    "no_config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config_not_json": (lambda f: (f / "config.json").write_text("{"), "damaged: it is not a JSON object"),
    "config_without_type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "unknown_type": (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "new to it"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors or"),
    "only_pickles": (_only_pickles, "only pickled weights"),
    "truncated": (_truncate, "truncated or damaged"),
    "index_damaged": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 1}'), "weight_map"),
    "index_escapes": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "weight_map",
    ),
    "index_promises": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "lacks a, which the index promises",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_has_a_name_when_opening(tmp_path, damage):
    spoil, message = DAMAGE[damage]
    write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_missing_tensor_is_named_when_its_segment_loads(tmp_path):
    write(tmp_path)
    _drop(tmp_path, "model.layers.2.mlp.up_proj.weight")
    checkpoint = open_checkpoint(str(tmp_path))
    load_trunk(checkpoint, BlockRange(0, 2), dtype=F32)
    with pytest.raises(ConfigError, match=r"lacks the tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load_trunk(checkpoint, BlockRange(1, 3), dtype=F32)


def test_weights_of_another_model_are_refused(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ConfigError, match="config and weights are of different models"):
        load_trunk(open_checkpoint(str(tmp_path)), BlockRange(1, 2), dtype=F32)


def test_unsupported_weight_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="choose float32, bfloat16 or float16"):
        load_trunk(open_checkpoint(write(tmp_path)), BlockRange(1, 2), dtype=torch.float64)


def test_reading_an_unknown_tensor_names_it(tmp_path):
    with pytest.raises(ConfigError, match="has no tensor nonesuch"):
        list(open_checkpoint(write(tmp_path)).read(["nonesuch"]))
