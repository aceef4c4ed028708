"""Twenty steps of a federation equal central training with transformers, peft and torch alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fedsea.client import setup
from fedsea.model.checkpoint import open_checkpoint
from fedsea.server.run import load_engine
from tests.support.central import Central, num_targets, portable, train_centrally
from tests.support.federation import Federation

TWENTY = {"rounds": 1, "steps_per_round": 20}
OPTIMIZER = {"learning_rate": 0.003, "weight_decay": 0.01, "warmup_steps": 3, "schedule": "linear"}


def initial(fed: Federation) -> dict[str, torch.Tensor]:
    """The adapters' values before the first step, of all segments."""
    plan = fed.plan
    checkpoint = open_checkpoint(plan.model.path)
    found = load_engine(plan, checkpoint, "cpu").parameters()
    for name in fed.names:
        found |= setup.load_segments(plan, checkpoint, name, "cpu").parameters()
    return dict(sorted(found.items()))


def streams(fed: Federation):
    """Every client's stream of batches, from the beginning."""
    plan = fed.plan
    checkpoint = open_checkpoint(plan.model.path)
    return {
        name: setup.open_stream(plan, setup.open_data(plan, checkpoint, fed.client_options(name)), name)
        for name in fed.names
    }


def batches_of_steps(fed: Federation):
    """The union of all clients' micro-batches, step by step."""
    taken = streams(fed)
    counts = {name: fed.plan.micro_batches_of(name)[0] for name in fed.names}
    return [[taken[name].next() for name in fed.names for _ in range(counts[name])] for _ in range(fed.plan.num_steps)]


def worst(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[name] - expected[name]).abs().max()) for name in expected)


def central_run(fed: Federation) -> tuple[Central, list[float]]:
    central = Central(fed.plan.model.path, fed.plan, initial(fed))
    return central, train_centrally(central, batches_of_steps(fed))


def union_losses(parts) -> list[float]:
    """Mean loss of each step over the clients' target tokens."""
    reports = zip(*(part.watch.steps for part in parts.values()), strict=True)
    return [
        sum(r.mean_loss * r.num_target_tokens for r in step) / sum(r.num_target_tokens for r in step)
        for step in reports
    ]


def test_one_client_equals_central_training(federation):
    fed = federation("a", training=TWENTY, optimizer=OPTIMIZER)
    parts = fed.train()
    central, losses = central_run(fed)
    assert union_losses(parts) == pytest.approx(losses, rel=1e-5)
    assert worst(fed.parameters(), central.values()) < 1e-4


UNEQUAL = {
    "a": {"input_blocks": 1, "output_blocks": 2, "micro_batch_sequences": 1},
    "b": {"input_blocks": 2, "output_blocks": 1, "micro_batch_sequences": 4, "micro_batches": 2},
}


def test_unequal_clients_with_summed_gradients_equal_central_training_on_the_union(federation):
    fed = federation("a", "b", training=TWENTY, optimizer=OPTIMIZER, aggregation={"sync": "step"}, clients=UNEQUAL)
    parts = fed.train()
    central, losses = central_run(fed)
    assert union_losses(parts) == pytest.approx(losses, rel=1e-5)
    assert worst(fed.parameters(), central.values()) < 1e-4


def test_gradients_of_unequal_clients_sum_to_those_of_the_union(federation):
    settings = {"rounds": 1, "steps_per_round": 1}
    fed = federation("a", "b", training=settings, aggregation={"sync": "step"}, clients=UNEQUAL)
    before = initial(fed)
    parts = fed.train()
    [batches] = batches_of_steps(fed)
    loss, expected = Central(fed.plan.model.path, fed.plan, before).gradients(batches)
    tensors, _ = fed.durable()["server"]
    found = {n.removeprefix("outcome."): t for n, t in tensors.items() if n.startswith("outcome.")}
    assert union_losses(parts)[0] * num_targets(batches) == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_training_the_trunk_alone_equals_central_training(federation):
    frozen = {"input": "frozen", "output": "frozen"}
    sizes = {"a": {"micro_batch_sequences": 1}, "b": {"micro_batch_sequences": 4, "micro_batches": 2}}
    fed = federation("a", "b", training=TWENTY, optimizer=OPTIMIZER, adapter=frozen, clients=sizes)
    fed.train()
    central, _ = central_run(fed)
    assert worst(fed.parameters(), central.values()) < 1e-4


def test_training_the_output_side_alone_equals_central_training_and_sends_no_gradient(federation):
    fed = federation("a", training=TWENTY, optimizer=OPTIMIZER, adapter={"input": "frozen", "trunk": "frozen"})
    parts = fed.train()
    central, _ = central_run(fed)
    assert worst(fed.parameters(), central.values()) < 1e-4
    assert "Backward" not in parts["a"].result.bytes_by_kind
    assert "InputGradient" not in parts["a"].result.bytes_by_kind


def test_taking_turns_equals_a_central_loop_over_the_turns(federation):
    """Each client has its own input and output blocks and optimizer; the trunk is one; averaging ends the round."""
    training = {"mode": "sequential", "rounds": 2, "steps_per_round": 5}
    fed = federation("a", "b", training=training, optimizer=OPTIMIZER)
    before = initial(fed)
    fed.train()
    central = {name: Central(fed.plan.model.path, fed.plan, before) for name in fed.names}
    in_trunk = load_engine(fed.plan, open_checkpoint(fed.plan.model.path), "cpu").parameters().keys()
    at_client = before.keys() - in_trunk
    share_parameters(central["a"], central["b"], in_trunk)
    adam = {name: one.trainer(sorted(at_client)) for name, one in central.items()}
    trunk = central["a"].trainer(sorted(in_trunk))
    taken = streams(fed)
    steps = iter(range(fed.plan.num_steps))
    for _ in range(2):
        weights = dict.fromkeys(fed.names, 0)
        for name in fed.names:
            for _ in range(5):
                batch = taken[name].next()
                weights[name] += batch.num_target_tokens
                central[name].model.zero_grad()
                (central[name].summed_loss([batch]) / batch.num_target_tokens).backward()
                nn.utils.clip_grad_norm_(list(central[name].parameters.values()), 1.0)
                step = next(steps)
                trunk.step(step)
                adam[name].step(step)
        average(central, at_client, weights)
    for name in fed.names:
        tensors, _ = fed.durable()[name]
        found = {n.removeprefix("parameter."): t for n, t in tensors.items() if n.startswith("parameter.")}
        assert worst(found, {n: central[name].values()[n] for n in found}) < 1e-4
    tensors, _ = fed.durable()["server"]
    found = {n: tensors[f"engine.parameter.{n}"] for n in in_trunk}
    assert worst(found, {n: central["a"].values()[n] for n in in_trunk}) < 1e-4


def share_parameters(one: Central, other: Central, names) -> None:
    """Let `other` use the very parameters of `one`."""
    for module in other.model.modules():
        for key, parameter in list(module._parameters.items()):
            for name in names:
                if parameter is other.parameters.get(name):
                    module._parameters[key] = one.parameters[name]
    for name in names:
        other.parameters[name] = one.parameters[name]
    assert {portable(n) for n, p in other.model.named_parameters() if p.requires_grad} == other.parameters.keys()


def average(central: dict[str, Central], names, weights: dict[str, int]) -> None:
    total = sum(weights.values())
    with torch.no_grad():
        for key in names:
            mean = sum(one.parameters[key].double() * (weights[name] / total) for name, one in central.items())
            for one in central.values():
                one.parameters[key].copy_(mean)


def test_accumulated_micro_batches_in_flight_equal_one_batch(federation):
    settings = {"rounds": 1, "steps_per_round": 6}
    whole = federation("a", training={**settings, "micro_batch_sequences": 6})
    parts = federation("a", training={**settings, "micro_batch_sequences": 2, "micro_batches": 3, "in_flight": 2})
    for fed in (whole, parts):
        fed.train()
    assert worst(parts.parameters(), whole.parameters()) < 1e-4


def test_a_union_beyond_max_batch_tokens_is_split_without_changing_the_result(federation):
    settings = {"rounds": 1, "steps_per_round": 6}
    together = federation("a", "b", "c", training=settings)
    split = federation("a", "b", "c", training={**settings, "max_batch_tokens": 100})
    for fed in (together, split):
        fed.train()
    assert worst(split.parameters(), together.parameters()) < 1e-4


def of_ten_steps(codec):
    return {"training": {"rounds": 1, "steps_per_round": 10}, "wire": {"hidden": codec, "gradient": codec}}


@pytest.fixture(scope="module")
def exact(tmp_path_factory, base_model, identities):
    """What two clients came to with fp32 on the wire."""
    folder = tmp_path_factory.mktemp("exact") / "federation"
    fed = Federation(folder, base_model, identities, ("a", "b"), of_ten_steps("fp32"))
    with contextlib.closing(fed):
        return fed.train()


@pytest.mark.parametrize(("codec", "near"), [("bf16", 0.01), ("fp16", 0.002), ("int8", 0.03)])
def test_narrow_codecs_train_and_stay_near_fp32(federation, exact, codec, near):
    found = federation("a", "b", **of_ten_steps(codec)).train()
    wide, narrow = union_losses(exact), union_losses(found)
    assert narrow[-1] < 0.97 * narrow[0]
    assert narrow == pytest.approx(wide, rel=near)
    sent = [sum(part.result.bytes_by_kind["Forward"] for part in parts.values()) for parts in (exact, found)]
    assert sent[1] < 0.6 * sent[0]
