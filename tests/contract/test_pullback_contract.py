"""Gradients outside any step: what every trunk promises a client that trains something of its own through it."""

from __future__ import annotations

import pytest
import torch

from fedsea.client.trunk import Connected, Standing
from fedsea.errors import FedseaError
from fedsea.wire import messages as m
from tests.contract.trunks import BOUNDARY, get, values, where

PLAN = {
    "adapter": {"dropout": 0.5},
    "training": {"rounds": 1, "steps_per_round": 1, "micro_batches": 1, "micro_batch_sequences": 3},
}


def pulled(trunk, number=7, hidden=5, gradient=6):
    sealed = trunk.seal(BOUNDARY.hidden(values(hidden)))
    output = trunk.evaluate(where(number), sealed)
    back = trunk.pull_back(where(number), sealed, trunk.seal(BOUNDARY.gradient(values(gradient))))
    return get(output), get(back)


def test_gradient_at_the_input_is_that_of_what_was_evaluated(bench):
    bench = bench()
    trunk = bench.trunk(Standing())
    output, gradient = pulled(trunk)
    expected_output, expected_gradient = bench.direct.run(values(5), values(6))
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient)


def test_several_may_be_asked_for_at_once(bench):
    bench = bench()
    trunk = bench.trunk(Standing())
    hidden = [trunk.seal(BOUNDARY.hidden(values(seed))) for seed in range(3)]
    futures = [
        trunk.pull_back(where(number), sealed, trunk.seal(BOUNDARY.gradient(values(10 + number))))
        for number, sealed in enumerate(hidden)
    ]
    for number, future in enumerate(futures):
        assert torch.equal(get(future), bench.direct.run(values(number), values(10 + number))[1])


def test_step_under_way_is_left_alone_and_the_trunk_learns_nothing(bench):
    bench = bench(adapter={"dropout": 0.0})
    trunk = bench.trunk(Standing())
    assert trunk.next_event() == Connected()
    assert trunk.next_event() == m.StepOpen(0, 0)
    output = get(trunk.forward(where(), trunk.seal(BOUNDARY.hidden(values(0)))))
    pulled(trunk)
    gradient = get(trunk.backward(where(), trunk.seal(BOUNDARY.gradient(values(1)))))
    pulled(trunk)
    trunk.ready(0, 0, 7, 0.0, trunk.seal(BOUNDARY.update({})))
    assert isinstance(trunk.next_event(), m.StepDone)
    direct = bench.direct
    expected_output, expected_gradient = direct.run(values(0), values(1))
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient)
    direct.step(0, 7, 0.0)
    fetched, expected = get(trunk.fetch()).tensors, direct.parameters()
    assert all(torch.equal(fetched[name], expected[name]) for name in expected)


def test_gradient_that_would_overflow_is_refused(bench):
    bench = bench()
    trunk = bench.trunk(Standing())
    sealed = trunk.seal(BOUNDARY.hidden(values(5)))
    with pytest.raises(FedseaError, match="too large"):
        get(trunk.pull_back(where(7), sealed, trunk.seal(BOUNDARY.gradient(values(6) * 1e30))))
