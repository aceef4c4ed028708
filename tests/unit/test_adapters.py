"""What `fedsea.model.adapters` promises: portable names, values that depend on seed and name alone, strict loading."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fedsea.client.setup import ClientOptions, open_base_model
from fedsea.errors import ConfigError, NonFiniteError, ProtocolError
from fedsea.model import adapters
from fedsea.model.layout import blocks_of, linear_layers
from fedsea.model.partition import build, cut
from fedsea.plan import AdapterSection, FederationPlan, parse_plan
from fedsea.types import Partition, SegmentKind

KINDS = tuple(SegmentKind)
Q_PROJ = "model.layers.{}.self_attn.q_proj.lora_{}.weight"


@dataclass
class Segment:
    kind: SegmentKind
    model: PreTrainedModel


def llama(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "num_hidden_layers": 4, "vocab_size": 64, **changes})


def gpt2() -> GPT2Config:
    return GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)


def whole(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return (LlamaForCausalLM if isinstance(config, LlamaConfig) else GPT2LMHeadModel)(config)


def segment(model: PreTrainedModel, kind: SegmentKind, partition: Partition) -> Segment:
    skeleton, layout = build(model.config, model.dtype)
    cut(skeleton, layout, kind, blocks_of(kind, partition, model.config.num_hidden_layers))
    weights = model.state_dict()
    skeleton.load_state_dict({name: weights[name].clone() for name in skeleton.state_dict()}, assign=True)
    return Segment(kind, skeleton)


def segments(model: PreTrainedModel, partition: Partition, settings: AdapterSection, seed: int = 5) -> list[Segment]:
    made = [segment(model, kind, partition) for kind in KINDS]
    for part in made:
        adapters.attach(part, settings, getattr(settings, part.kind.value), seed)
    return made


def merged(parts: list[Segment]) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts for name, tensor in adapters.read(part).items()}


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 1), (2, 1), (1, 0)])
def test_any_partition_starts_from_the_same_values(k: int, m: int) -> None:
    model, settings = whole(llama()), AdapterSection(rank=3)
    reference = merged(segments(model, Partition(1, 2), settings))
    found = merged(segments(model, Partition(k, m), settings))
    assert found.keys() == reference.keys()
    assert len(found) == 4 * 7 * 2
    assert all(torch.equal(found[name], reference[name]) for name in found)


def test_initial_values_change_with_seed_and_name() -> None:
    model, settings = whole(llama()), AdapterSection()
    one, other = (merged(segments(model, Partition(1, 1), settings, seed)) for seed in (5, 6))
    name, sibling = Q_PROJ.format(0, "A"), Q_PROJ.format(1, "A")
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[sibling])


def test_initial_values_are_lora_s() -> None:
    values = merged(segments(whole(llama()), Partition(1, 1), AdapterSection(rank=64)))
    a, b = values[Q_PROJ.format(0, "A")], values[Q_PROJ.format(0, "B")]
    assert float(b.abs().sum()) == 0
    bound = 1 / 32**0.5  # kaiming uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
    assert 0.95 * bound < float(a.abs().max()) <= bound
    assert abs(float(a.mean())) < 0.04 * bound


def test_attaching_draws_nothing_from_the_global_generator() -> None:
    model = whole(llama())
    before = torch.get_rng_state()
    segments(model, Partition(1, 1), AdapterSection())
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_adapters_leave_the_model_as_it_was() -> None:
    model = whole(llama())
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    adapters.attach(Segment(SegmentKind.TRUNK, model), AdapterSection(), "adapter", 0)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_do_not_touch_embedding_norm_or_head(make: Any) -> None:
    values = merged(segments(whole(make()), Partition(1, 1), AdapterSection()))
    assert values
    assert all(".layers." in name or ".h." in name for name in values)


def test_only_the_named_targets_are_adapted() -> None:
    values = merged(segments(whole(llama()), Partition(1, 1), AdapterSection(targets=("q_proj", "mlp.up_proj"))))
    assert {name.split(".", 3)[3].rpartition(".lora")[0] for name in values} == {"self_attn.q_proj", "mlp.up_proj"}


def test_a_router_that_gives_scores_and_choices_is_not_adapted() -> None:
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
        "num_experts_per_tok": 1, "pad_token_id": 0,
    }  # fmt: skip
    found = linear_layers(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **settings)))
    assert any("q_proj" in name for name in found)
    assert not any("router" in name for name in found)


EXPERTS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "n_routed_experts": 4, "num_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_layers_that_peft_takes_for_experts_are_left_out_and_attention_is_adapted(family: str) -> None:
    """Dense and shared layers are called there as the experts were that are one tensor now."""
    config = AutoConfig.for_model(family, **EXPERTS)
    torch.manual_seed(0)
    model, settings, partition = AutoModelForCausalLM.from_config(config), AdapterSection(rank=3), Partition(1, 1)
    for part in segments(model, partition, settings):
        found = {name: tuple(p.shape) for name, p in adapters.trainable(part).items()}
        assert found == adapters.trainable_shapes(config, partition, [part.kind], settings)
        assert {name.split(".")[3] for name in found} == {"self_attn"}
    with pytest.raises(ConfigError, match=r"'up_proj' names no linear layer .* can adapt.*self_attn\.o_proj"):
        adapters.check_settings(config, AdapterSection(targets=("up_proj",)))


def test_the_head_is_adapted_if_named() -> None:
    parts = segments(whole(llama()), Partition(1, 1), AdapterSection(targets=("lm_head",)))
    assert [list(adapters.trainable(part)) for part in parts] == [
        [],
        [],
        ["lm_head.lora_A.weight", "lm_head.lora_B.weight"],
    ]


def test_a_segment_without_blocks_stays_frozen() -> None:
    part = segment(whole(llama()), SegmentKind.INPUT, Partition(0, 1))
    adapters.attach(part, AdapterSection(), "adapter", 0)
    assert adapters.trainable(part) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_parameters_are_float32_and_get_gradients(dtype: torch.dtype) -> None:
    model = whole(llama()).to(dtype)
    adapters.attach(Segment(SegmentKind.TRUNK, model), AdapterSection(), "adapter", 0)
    parameters = adapters.trainable(Segment(SegmentKind.TRUNK, model))
    logits = model(torch.arange(8)[None]).logits
    assert logits.dtype == dtype
    logits.float().square().sum().backward()
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert all(float(p.grad.abs().sum()) > 0 for name, p in parameters.items() if "lora_B" in name)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


def test_full_training_trains_every_parameter_in_float32() -> None:
    settings = AdapterSection(input="full", output="full")
    model = whole(llama()).to(torch.bfloat16)
    first, trunk, last = segments(model, Partition(1, 1), settings)
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= adapters.trainable(first).keys()
    assert {"model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight"} <= adapters.trainable(
        last
    ).keys()
    assert all(p.dtype == torch.float32 for part in (first, last) for p in adapters.trainable(part).values())
    assert all("lora_" in name for name in adapters.trainable(trunk))


def test_names_come_sorted_and_without_the_name_of_peft_s_adapter() -> None:
    names = list(adapters.trainable(segments(whole(llama()), Partition(1, 1), AdapterSection())[1]))
    assert names == sorted(names)
    assert Q_PROJ.format(1, "A") in names


def test_values_survive_read_and_load() -> None:
    model = whole(llama())
    first, second = (segments(model, Partition(1, 1), AdapterSection(), seed)[1] for seed in (1, 2))
    values = adapters.read(first)
    values[Q_PROJ.format(1, "B")].add_(1.0)
    adapters.load(second, values)
    assert all(torch.equal(values[name], p) for name, p in adapters.trainable(second).items())
    assert float(adapters.read(first)[Q_PROJ.format(1, "B")].abs().sum()) == 0, "read must copy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, name: values.pop(name), "lack"),
        (lambda values, name: values.update(other=torch.zeros(1)), "'other', which is not trained"),
        (lambda values, name: values.update({name: torch.zeros(3, 3)}), r"shape \(3, 3\) instead of \(8, 32\)"),
        (lambda values, name: values.update({name: values[name].int()}), "dtype torch.int32"),
        (lambda values, name: values[name].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "nan"],
)
def test_unfit_values_are_refused_and_nothing_changes(change: Any, message: str) -> None:
    part = segments(whole(llama()), Partition(1, 1), AdapterSection())[1]
    before = adapters.read(part)
    values = {name: tensor + 1 for name, tensor in before.items()}
    change(values, Q_PROJ.format(2, "A"))
    with pytest.raises(ConfigError, match=message):
        adapters.load(part, values)
    assert all(torch.equal(before[name], p) for name, p in adapters.trainable(part).items())


def test_values_of_a_peer_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match=r"lack a\.lora_A\.weight"):
        adapters.check_tensors({}, {"a.lora_A.weight": (1, 2)})
    with pytest.raises(NonFiniteError):
        adapters.check_tensors({"a": torch.full((1,), float("inf"))}, {"a": (1,)}, NonFiniteError)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 1), (1, 0)])
@pytest.mark.parametrize(("input_", "output"), [("adapter", "adapter"), ("full", "frozen"), ("frozen", "full")])
def test_expected_shapes_are_those_of_real_segments(make: Any, k: int, m: int, input_: Any, output: Any) -> None:
    settings = AdapterSection(rank=3, input=input_, output=output)
    model, partition = whole(make()), Partition(k, m)
    for part in segments(model, partition, settings):
        expected = {name: tuple(p.shape) for name, p in adapters.trainable(part).items()}
        found = adapters.trainable_shapes(model.config, partition, [part.kind], settings)
        assert found == expected
        assert list(found) == sorted(found)


def test_expected_shapes_of_several_segments_are_their_union() -> None:
    config, settings = llama(), AdapterSection(targets=("q_proj", "lm_head"))
    found = adapters.trainable_shapes(config, Partition(1, 1), [SegmentKind.INPUT, SegmentKind.OUTPUT], settings)
    assert set(found) == {
        *(Q_PROJ.format(block, factor) for block in (0, 3) for factor in "AB"),
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
    }


def test_a_target_that_nothing_matches_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'query' names no linear layer .*mlp\.down_proj.*self_attn\.q_proj"):
        adapters.check_settings(llama(), AdapterSection(targets=("q_proj", "query")))


def plan_of(adapter: dict[str, Any], *cuts: tuple[int, int]) -> FederationPlan:
    clients = [{"name": f"c{i}", "input_blocks": k, "output_blocks": m} for i, (k, m) in enumerate(cuts)]
    return parse_plan({"model": {"path": "m"}, "adapter": adapter, "clients": clients})


@pytest.mark.parametrize("cut_", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["q_proj", "lm_head"], ["mlp.up_proj"]])
@pytest.mark.parametrize("ends", ["adapter", "full"])
def test_a_plan_counts_as_trained_what_its_model_trains(cut_: tuple[int, int], targets: Any, ends: str) -> None:
    plan, config = plan_of({"targets": targets, "input": ends, "output": ends}, cut_), llama()
    adapters.check_plan(config, plan)
    counted = (plan.trains_below_cut("c0"), plan.trains_trunk, plan.trains_output("c0"))
    for kind, trained in zip(KINDS, counted, strict=True):
        assert bool(adapters.trainable_shapes(config, Partition(*cut_), [kind], plan.adapter)) is trained, kind


def test_the_head_of_a_block_is_no_head_and_not_adapted() -> None:
    model = whole(llama())
    model.model.layers[1].lm_head = torch.nn.Linear(4, 4)
    model.other = torch.nn.Linear(4, 4)
    found = [name for name in linear_layers(model) if name.endswith(("lm_head", "other"))]
    assert found == ["lm_head"]


def test_a_segment_that_holds_no_target_is_refused() -> None:
    config = llama()
    with pytest.raises(ConfigError, match="'embed_tokens' names no linear layer"):
        adapters.check_plan(config, plan_of({"targets": ["embed_tokens"]}, (0, 0)))
    first = {"targets": ["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(ConfigError, match=r'adapter\.trunk = "adapter", but the trunk has no linear layer that'):
        adapters.check_plan(config, plan_of({**first, "output": "frozen"}, (1, 1)))
    with pytest.raises(ConfigError, match=r"the output segment of client c0 .* set adapter.output = \"frozen\""):
        adapters.check_plan(config, plan_of({**first, "trunk": "frozen"}, (1, 1)))
    second = {"targets": ["model.layers.1.self_attn.q_proj"], "output": "frozen"}
    with pytest.raises(ConfigError, match=r"the input segment of client c1 .* set adapter.input = \"frozen\""):
        adapters.check_plan(config, plan_of(second, (2, 1), (1, 1)))


def test_training_both_copies_of_a_tied_weight_is_refused() -> None:
    both = AdapterSection(input="full", output="full")
    with pytest.raises(ConfigError, match="ties its embedding"):
        adapters.check_settings(llama(tie_word_embeddings=True), both)
    adapters.check_settings(llama(), both)
    adapters.check_settings(llama(tie_word_embeddings=True), AdapterSection(input="full"))


def test_a_client_that_trains_alone_is_told_so_too(tmp_path: Path) -> None:
    LlamaForCausalLM(llama(tie_word_embeddings=True)).save_pretrained(tmp_path)
    sections = {"model": {"path": str(tmp_path)}, "adapter": {"input": "full", "output": "full"}}
    plan = parse_plan({**sections, "clients": [{"name": "a"}]}).alone("a")
    with pytest.raises(ConfigError, match="ties its embedding"):
        open_base_model(plan, ClientOptions("", Path("identity")), "a")


def test_lora_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="tied to the embedding"):
        adapters.check_settings(llama(tie_word_embeddings=True), AdapterSection(targets=("lm_head",)))


def test_dropout_repeats_under_the_same_seed_and_leaves_the_generator_alone() -> None:
    part = segments(whole(llama()), Partition(1, 1), AdapterSection(dropout=0.5))[1]
    layer = next(module for module in part.model.modules() if isinstance(module, LoraLayer))
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.ones(2, 32)
    before = torch.get_rng_state()

    def run(seed: int) -> torch.Tensor:
        with adapters.seeded(seed):
            return layer.train()(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_are_fixed_for_ever() -> None:
    # Checkpoints and other clients rely on these values: a change here breaks running federations.
    assert adapters.derive_seed(0, "model.layers.0.self_attn.q_proj.lora_A.weight") == 1773786622691421865
    assert adapters.derive_seed(1, 23) != adapters.derive_seed(12, 3)
    assert 0 <= adapters.derive_seed("x") < 2**63
