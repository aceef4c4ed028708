"""How parameters of several clients become one set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.federation.aggregation import Contribution, aggregate, mean, median, sum_gradients, trimmed_mean
from fedsea.plan import AggregationSection


def values(*numbers: float) -> list[torch.Tensor]:
    return [torch.tensor([float(number)]) for number in numbers]


def test_the_mean_weighs_by_tokens():
    assert mean(values(0, 10), [3, 1]).item() == 2.5


def test_the_mean_without_any_weight_weighs_alike():
    assert mean(values(0, 10), [0, 0]).item() == 5.0


def test_the_mean_sums_in_float64():
    huge, small = 2.0**24, 1.0
    assert mean(values(huge, small, -huge), [1, 1, 1]).item() == pytest.approx(1 / 3)


def test_a_median_of_two_large_values_does_not_overflow():
    assert median(values(3e38, 3.2e38), [1, 1]).item() == pytest.approx(3.1e38)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_the_median_is_numpys(numbers):
    import numpy as np

    expected = np.median(np.array(numbers, dtype=np.float32))
    assert median(values(*numbers), [1] * len(numbers)).item() == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


def test_the_median_ignores_one_client_gone_wild():
    assert median(values(1, 2, 1e30), [1, 1, 1]).item() == 2.0


def test_the_trimmed_mean_cuts_both_ends_of_each_coordinate():
    found = trimmed_mean(0.25)([torch.tensor([float(i), float(-i)]) for i in (0, 2, 4, 1000)], [1] * 4)
    assert found.tolist() == [3.0, -3.0]


def test_a_small_trim_of_few_clients_is_the_mean():
    assert trimmed_mean(0.1)(values(1, 3), [5, 1]).item() == 2.0


@pytest.mark.parametrize("count", [3, 5, 9, 10])
def test_one_of_three_or_more_is_always_cut_off(count):
    assert trimmed_mean(0.1)(values(*[0.0] * (count - 1), 1e6), [1] * count).item() == 0.0


@pytest.mark.parametrize(("method", "expected"), [("mean", 4.0), ("median", 2.0), ("trimmed_mean", 2.0)])
def test_the_plan_chooses_the_method(method, expected):
    contributions = [Contribution({"x": value}, 1.0) for value in values(1, 2, 9)]
    chosen = AggregationSection(method=method, trim_fraction=0.34)
    assert aggregate(contributions, chosen)["x"].item() == pytest.approx(expected)


def test_each_parameter_is_averaged_over_those_who_hold_it():
    one = Contribution({"x": torch.zeros(1), "y": torch.ones(1)}, 3.0)
    other = Contribution({"x": torch.full((1,), 4.0), "z": torch.full((1,), 7.0)}, 1.0)
    found = aggregate([one, other], AggregationSection())
    assert {name: tensor.item() for name, tensor in found.items()} == {"x": 1.0, "y": 1.0, "z": 7.0}


def test_an_aggregate_does_not_share_memory_with_what_came_in():
    tensor = torch.ones(1)
    found = aggregate([Contribution({"x": tensor}, 1.0)], AggregationSection(method="median"))
    tensor += 1
    assert found["x"].item() == 1.0


def test_summed_gradients_touch_nobodys_own():
    one, other = torch.ones(2), torch.ones(2)
    found = sum_gradients([{"b": one}, {"b": other, "a": other}])
    assert list(found) == ["a", "b"]
    assert found["b"].tolist() == [2.0, 2.0]
    found["a"] += 1
    assert one.tolist() == other.tolist() == [1.0, 1.0]
