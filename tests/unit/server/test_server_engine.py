"""The trunk's arithmetic: the optimizer step, and averaging where clients cut the model at different places."""

from __future__ import annotations

import pytest
import torch

from fedsea.client.setup import load_segments
from fedsea.errors import ConfigError, NonFiniteError
from fedsea.federation.aggregation import Contribution
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.passes import Entry
from fedsea.plan import FederationPlan, parse_plan
from fedsea.server.engine import Engine, TrunkOverflow, at_fault
from fedsea.server.run import load_engine, make_roster, resolve, trunk_blocks
from fedsea.types import BlockRange
from tests.support.assets import HIDDEN


def make_plan(base_model, **sections) -> FederationPlan:
    clients = sections.pop("clients", [{"name": "a"}, {"name": "b"}])
    return parse_plan({"model": {"path": str(base_model)}, "adapter": {"rank": 2}, "clients": clients, **sections})


def make_engine(plan: FederationPlan) -> Engine:
    return load_engine(plan, open_checkpoint(plan.model.path), "cpu")


UNLIKE = [{"name": "a", "input_blocks": 2}, {"name": "b", "output_blocks": 2}]


def test_the_trunk_holds_every_block_that_a_client_leaves_to_it(base_model):
    plan = make_plan(base_model, clients=UNLIKE)
    roster = make_roster(plan, open_checkpoint(str(base_model)))
    assert trunk_blocks(plan, 5) == BlockRange(1, 4)
    assert (roster["a"].blocks, roster["b"].blocks) == (BlockRange(2, 4), BlockRange(1, 3))
    assert any(".layers.1." in name for name in roster["a"].shapes)
    assert not any(".layers.1." in name for name in roster["b"].shapes)


def test_a_parameter_that_trunk_and_clients_share_is_averaged_over_all_who_trained_it(base_model):
    plan = make_plan(base_model, clients=UNLIKE)
    engine, checkpoint = make_engine(plan), open_checkpoint(str(base_model))
    ours = {name: load_segments(plan, checkpoint, name, "cpu").parameters() for name in "ab"}
    weights = {"a": 30.0, "b": 10.0}
    contributions = {
        name: Contribution({key: torch.full_like(t, 1.0 + (name == "b")) for key, t in ours[name].items()}, weight)
        for name, weight in weights.items()
    }
    before = engine.parameters()
    result = engine.average(contributions)
    after = engine.parameters()

    at_both = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.allclose(result[at_both], torch.full_like(result[at_both], 1.25))
    shared = "model.layers.1.self_attn.q_proj.lora_A.weight"  # a's own, in the trunk for b
    assert torch.allclose(result[shared], (30 * torch.ones_like(before[shared]) + 10 * before[shared]) / 40)
    assert torch.equal(after[shared], result[shared])
    trunk_only = "model.layers.2.self_attn.q_proj.lora_A.weight"
    assert trunk_only not in result
    assert torch.equal(after[trunk_only], before[trunk_only])


def run_slot(engine: Engine, value: float = 1.0, scale: float = 1.0) -> None:
    hidden = torch.full((3, HIDDEN), value).cumsum(1)
    engine.passes.forward(0, 0, [Entry("a", hidden, (3,), engine.trunk.range, True)])
    engine.passes.backward(0, {"a": scale * torch.ones(3, HIDDEN)})


def test_the_clip_is_shared_only_if_it_is_over_all_segments(base_model):
    for scope in ("global", "segment"):
        optimizer = {"max_norm": 0.01, "clip_scope": scope}
        engine = make_engine(make_plan(base_model, optimizer=optimizer))
        run_slot(engine)
        outcome = engine.finish(0, 3, 100.0, {})
        assert (outcome.clip_coefficient < 1e-2) == (scope == "global")


def test_no_clipping_with_max_norm_zero(base_model):
    engine = make_engine(make_plan(base_model, optimizer={"max_norm": 0.0}))
    run_slot(engine)
    assert engine.finish(0, 3, 1e12, {}).clip_coefficient == 1.0


@pytest.mark.parametrize("value", [3e38, float("inf"), float("nan")])
def test_summed_gradients_name_the_client_whose_are_none(base_model, value):
    engine = make_engine(make_plan(base_model, aggregation={"sync": "step"}))
    run_slot(engine)
    before = engine.parameters()
    gradients = {"a": {"x": torch.ones(2)}, "b": {"x": torch.tensor([1.0, value])}}
    with pytest.raises(NonFiniteError, match="client b") as caught:
        engine.finish(0, 3, 0.0, gradients)
    assert caught.value.client == "b"
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.parameters().items())


def test_the_trunks_own_overflow_is_found_in_the_share_of_one_client(base_model):
    engine = make_engine(make_plan(base_model, adapter={"rank": 2, "alpha": 1e20}))  # it multiplies the gradients
    hidden = torch.ones(3, HIDDEN).cumsum(1)
    entry = {name: Entry(name, hidden, (3,), engine.trunk.range, False) for name in "ab"}
    gradients = {"a": torch.ones(3, HIDDEN), "b": torch.full((3, HIDDEN), 5e19)}
    engine.passes.forward(4, 0, [entry["a"], entry["b"]])
    engine.passes.backward(0, gradients)
    with pytest.raises(TrunkOverflow, match="The trunk's gradient of step 4 overflowed"):
        engine.finish(4, 6, 0.0, {})
    shares = engine.shares(4, {name: [(0, entry[name], gradients[name])] for name in "ab"})
    assert at_fault(4, shares).client == "b"
    assert all(parameter.grad is None for parameter in engine.optimizer.parameters.values())


def test_an_overflow_that_nobody_caused_alone_names_the_trunk_and_the_largest():
    error = at_fault(4, {"a": 1e38, "b": 3e38, "c": 2e38})
    assert error.client == ""
    assert "trunk's gradient of step 4 (the largest contribution is that of client b)" in error.message


@pytest.mark.parametrize("sync", ["round", "step"])
def test_gradients_that_are_not_finite_change_nothing(base_model, sync):
    engine = make_engine(make_plan(base_model, aggregation={"sync": sync}))
    before = engine.parameters()
    run_slot(engine)
    for parameter in engine.optimizer.parameters.values():
        parameter.grad[...] = float("inf")
    with pytest.raises(NonFiniteError):
        engine.finish(0, 3, 0.0, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.parameters().items())


def test_an_input_gradient_that_is_not_finite_names_its_client(base_model):
    engine = make_engine(make_plan(base_model))
    entries = [Entry(name, torch.ones(3, HIDDEN), (3,), engine.trunk.range, True) for name in "ab"]
    engine.passes.forward(0, 0, entries)
    gradients = {"a": torch.ones(3, HIDDEN), "b": torch.full((3, HIDDEN), float("inf"))}
    with pytest.raises(NonFiniteError) as caught:
        engine.passes.backward(0, gradients)
    assert caught.value.client == "b"


def test_a_reset_forgets_graphs_and_gradients(base_model):
    engine = make_engine(make_plan(base_model))
    before = engine.parameters()
    run_slot(engine)
    engine.reset()
    engine.finish(0, 3, 0.0, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.parameters().items())


def test_the_engine_goes_on_from_its_tensors(base_model):
    first, second = (make_engine(make_plan(base_model)) for _ in range(2))
    run_slot(first)
    first.finish(0, 3, 0.0, {})
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    for engine in (first, second):
        run_slot(engine, 2.0)
        engine.finish(1, 3, 0.0, {})
    expected = first.tensors()
    assert second.tensors().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.tensors().items())


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_round_of_too_few_clients_for_its_method_is_told(base_model, caplog, names):
    clients = [{"name": name} for name in "abc"]
    engine = make_engine(make_plan(base_model, clients=clients, aggregation={"method": "median"}))
    engine.average({name: Contribution({"x": torch.ones(1)}, 1.0) for name in names})
    assert ("2 clients' parameters, and median limits nothing" in caplog.text) == (names == "ab")


def test_the_resolved_plan_names_every_unit_of_the_model(base_model):
    checkpoint = open_checkpoint(str(base_model))
    plan = resolve(make_plan(base_model), checkpoint)
    assert {"config", "embedding", "block.0", "block.4", "norm", "head"} <= plan.model.fingerprint.keys()
    assert resolve(plan, checkpoint) == plan


def test_another_checkpoint_than_the_plan_names_is_refused(base_model):
    plan = make_plan(base_model)
    wrong = plan.model.model_copy(update={"fingerprint": {"block.3": "0" * 64}})
    with pytest.raises(ConfigError, match=r"block\.3 differ"):
        resolve(plan.model_copy(update={"model": wrong}), open_checkpoint(str(base_model)))
