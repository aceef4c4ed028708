"""`fedsea.model.optim` against torch's AdamW, clipping and transformers' schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import get_scheduler

from fedsea.errors import ConfigError, NonFiniteError
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.plan import OptimizerSection

SHAPES = {"b": (3, 4), "a": (5,), "c": (2, 2, 2)}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) * 3 for name, shape in SHAPES.items()}


def advance(optimizer: SegmentOptimizer, steps: range, scale: float = 0.25) -> None:
    for step in steps:
        optimizer.set_gradients(gradients(step))
        clip = clip_coefficient(optimizer.squared_norm(scale), optimizer.settings.max_norm)
        optimizer.step(step, scale, clip)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_training_equals_torch_adamw_with_clipping_and_schedule(schedule: str, max_norm: float) -> None:
    settings = OptimizerSection(
        learning_rate=0.05, weight_decay=0.1, max_norm=max_norm, schedule=schedule, warmup_steps=3, betas=(0.8, 0.95)
    )
    ours = parameters()
    advance(SegmentOptimizer(ours, settings, num_steps=10), range(10), scale=0.25)

    theirs = parameters()
    adamw = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-8)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, adamw, num_warmup_steps=3, num_training_steps=10)
    for step in range(10):
        for key, gradient in gradients(step).items():
            theirs[key].grad = gradient * 0.25
        if max_norm:
            nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        adamw.step()
        scheduler.step()
    for key in SHAPES:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_lies_otherwise_in_memory_gives_the_same_step() -> None:
    """torch's fused AdamW takes no notice of strides."""
    settings, found = OptimizerSection(learning_rate=0.1), []
    for as_it_lies in (lambda g: g, lambda g: g.t().contiguous().t()):
        ours = {"b": parameters()["b"]}
        optimizer = SegmentOptimizer(ours, settings, num_steps=4)
        optimizer.set_gradients({"b": as_it_lies(gradients(0)["b"])})
        optimizer.step(0, 1.0, 1.0)
        state = {name: as_it_lies(t) if t.dim() == 2 else t for name, t in optimizer.tensors().items()}
        optimizer.load_tensors(state)
        optimizer.set_gradients({"b": gradients(1)["b"]})
        optimizer.step(1, 1.0, 1.0)
        found.append(ours["b"].detach())
    assert torch.equal(*found)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 12),
    num_steps=st.integers(1, 12),
    step=st.integers(0, 20),
)
def test_rate_is_transformers_rate_at_every_step(schedule: str, warmup: int, num_steps: int, step: int) -> None:
    settings = OptimizerSection(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, adamw, num_warmup_steps=warmup, num_training_steps=num_steps).lr_lambdas[0]
    rate = SegmentOptimizer({}, settings, num_steps).learning_rate(step)
    # Past the end transformers' cosine turns up again; here it stays at 0.
    over = schedule != "constant" and step >= max(num_steps, warmup)
    assert rate == pytest.approx(0.0 if over else reference(step), abs=1e-12)


def test_resume_in_the_middle_is_bit_exact() -> None:
    settings = OptimizerSection(learning_rate=0.05, weight_decay=0.1)
    straight = parameters()
    advance(SegmentOptimizer(straight, settings, 8), range(8))

    first = parameters()
    before = SegmentOptimizer(first, settings, 8)
    advance(before, range(4))
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    after = SegmentOptimizer(second, settings, 8)
    after.load_tensors({name: tensor.clone() for name, tensor in before.tensors().items()} | {"a": torch.zeros(5)})
    advance(after, range(4, 8))
    assert all(torch.equal(second[name], straight[name]) for name in SHAPES)


def test_loaded_state_is_a_copy() -> None:
    before = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    advance(before, range(2))
    saved = {name: tensor.clone() for name, tensor in before.tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    after = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    after.load_tensors(saved)
    advance(after, range(2, 4))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_values_are_the_parameters_as_they_are_now_and_copies() -> None:
    optimizer = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    advance(optimizer, range(2))
    values = optimizer.values()
    assert {name: value.tolist() for name, value in values.items()} == {
        name: parameter.tolist() for name, parameter in optimizer.parameters.items()
    }
    advance(optimizer, range(2, 3))
    assert not any(torch.equal(values[name], parameter) for name, parameter in optimizer.parameters.items())


def test_state_names_say_parameter_and_moment() -> None:
    optimizer = SegmentOptimizer({"m.lora_A.weight": nn.Parameter(torch.ones(2))}, OptimizerSection(), 8)
    assert optimizer.tensors() == {}
    optimizer.set_gradients({"m.lora_A.weight": torch.ones(2)})
    optimizer.step(0, 1.0, 1.0)
    prefix = "optimizer.m.lora_A.weight."
    assert set(optimizer.tensors()) == {prefix + "exp_avg", prefix + "exp_avg_sq", prefix + "step"}


@pytest.mark.parametrize("change", ["missing moment", "foreign name", "shape"])
def test_state_of_other_parameters_is_refused(change: str) -> None:
    before = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    advance(before, range(1))
    tensors = before.tensors()
    if change == "missing moment":
        del tensors["optimizer.a.step"]
    elif change == "foreign name":
        tensors["optimizer.z.step"] = torch.zeros(())
    else:
        tensors["optimizer.a.exp_avg"] = torch.zeros(6)
    with pytest.raises(ConfigError, match=r"optimizer"):
        SegmentOptimizer(parameters(), OptimizerSection(), 8).load_tensors(tensors)


def test_squared_norm_scales_and_keeps_small_terms() -> None:
    # In float32, 1e8 + 1 is 1e8: the sum must be taken in float64.
    optimizer = SegmentOptimizer({"a": nn.Parameter(torch.zeros(2))}, OptimizerSection(), 1)
    optimizer.set_gradients({"a": torch.tensor([1e4, 1.0])})
    assert optimizer.squared_norm(1.0) == 1e8 + 1
    assert optimizer.squared_norm(0.5) == (1e8 + 1) / 4


def test_squared_norm_of_a_large_tensor_is_summed_over_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsea.model.optim._CHUNK", 7)
    optimizer = SegmentOptimizer({"a": nn.Parameter(torch.zeros(20))}, OptimizerSection(), 1)
    optimizer.set_gradients({"a": torch.arange(20.0)})
    assert optimizer.squared_norm(1.0) == sum(i * i for i in range(20))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(value: float) -> None:
    optimizer = SegmentOptimizer(parameters(), OptimizerSection(), 1)
    bad = gradients(0)
    bad["c"][0, 0, 0] = value
    optimizer.set_gradients(bad)
    with pytest.raises(NonFiniteError, match="gradient of c is not finite"):
        optimizer.squared_norm(1.0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.01, 100))
def test_clip_coefficient_is_torchs(values: list[float], max_norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    squared = float(parameter.grad.double().square().sum())
    expected = parameter.grad * clip_coefficient(squared, max_norm)
    nn.utils.clip_grad_norm_([parameter], max_norm)
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_complete_and_a_step_consumes_them() -> None:
    optimizer = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    optimizer.parameters["a"].grad = torch.ones(5)
    found = optimizer.gradients()
    assert {name: tuple(g.shape) for name, g in found.items()} == SHAPES
    assert float(found["b"].abs().sum()) == 0
    optimizer.step(0, 1.0, 1.0)
    assert all(p.grad is None for p in optimizer.parameters.values())


def test_gradients_of_other_parameters_are_refused() -> None:
    optimizer = SegmentOptimizer(parameters(), OptimizerSection(), 8)
    with pytest.raises(ConfigError, match="'c'"):
        optimizer.set_gradients({name: g for name, g in gradients(0).items() if name != "c"})
    with pytest.raises(ConfigError, match=r"gradient of a has shape \(6,\) instead of \(5,\)"):
        optimizer.set_gradients(gradients(0) | {"a": torch.zeros(6)})


def test_without_parameters_everything_is_a_no_op() -> None:
    optimizer = SegmentOptimizer({}, OptimizerSection(), 8)
    optimizer.zero_grad()
    optimizer.set_gradients({})
    optimizer.step(0, 1.0, 1.0)
    optimizer.load_tensors({})
    assert (optimizer.squared_norm(1.0), optimizer.gradients(), optimizer.tensors()) == (0.0, {}, {})
