"""What every trunk promises a client: one suite, run against the local and the remote one."""

from __future__ import annotations

import pytest
import torch

from fedsea.client.setup import load_segments
from fedsea.client.trunk import Connected, Standing, Trunk
from fedsea.errors import UnprotectedRelease
from fedsea.model.checkpoint import open_checkpoint
from fedsea.wire import messages as m
from tests.contract.trunks import BOUNDARY, Bench, get, values, where

PLAN = {"training": {"rounds": 2, "steps_per_round": 1, "micro_batches": 2, "micro_batch_sequences": 3}}


def opened(bench: Bench, step: int = 0) -> Trunk:
    """A trunk that has opened a step."""
    trunk = bench.trunk(Standing(next_step=step, round=step))
    assert trunk.next_event() == Connected()
    assert trunk.next_event() == m.StepOpen(step, 0)
    return trunk


def run_step(trunk: Trunk, step: int = 0, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Forward and backward of each micro-batch: output, and gradient at the trunk's input."""
    found = []
    for number in range(count):
        here = where(step, number=number, count=count)
        output = get(trunk.forward(here, trunk.seal(BOUNDARY.hidden(values(10 * step + number)))))
        gradient = BOUNDARY.gradient(values(100 + 10 * step + number))
        found.append((output, get(trunk.backward(here, trunk.seal(gradient)))))
    return found


def finish_step(trunk: Trunk, step: int = 0, squared_norm: float = 2.5) -> m.StepDone:
    trunk.ready(step, 0, 14, squared_norm, trunk.seal(BOUNDARY.update({})))
    done = trunk.next_event()
    assert isinstance(done, m.StepDone)
    return done


def test_forward_and_backward_give_what_the_trunk_itself_gives(bench):
    bench = bench()
    found = run_step(opened(bench))
    direct = bench.direct
    for number, (output, gradient) in enumerate(found):
        expected_output, expected_gradient = direct.run(values(number), values(100 + number))
        assert torch.equal(output, expected_output)
        assert torch.equal(gradient, expected_gradient)


def test_forwards_may_be_under_way_at_once(bench):
    bench = bench()
    trunk = opened(bench)
    futures = [
        trunk.forward(where(number=number, count=2), trunk.seal(BOUNDARY.hidden(values(number)))) for number in (0, 1)
    ]
    direct = bench.direct
    for number, future in enumerate(futures):
        assert torch.equal(get(future), direct.run(values(number), values(0))[0])


def test_a_step_updates_the_trunk_as_adamw_does_and_says_how_it_was_clipped(bench):
    bench = bench()
    trunk = opened(bench)
    run_step(trunk)
    done = finish_step(trunk, squared_norm=2.5)
    direct = bench.direct
    for number in range(2):
        direct.run(values(number), values(100 + number))
    clip = direct.step(0, 14, 2.5)
    assert (done.step, done.num_target_tokens) == (0, 14)
    assert done.clip_coefficient == pytest.approx(clip, rel=1e-12)
    state = get(trunk.fetch())
    assert state.next_step == 1
    fetched = state.tensors
    expected = direct.parameters()
    assert fetched.keys() == expected.keys()
    assert all(torch.equal(fetched[name], expected[name]) for name in expected)


def test_summed_gradients_come_back_with_the_step(bench):
    bench = bench(
        aggregation={"sync": "step"},
        training={"rounds": 1, "steps_per_round": 1, "micro_batches": 2, "micro_batch_sequences": 3},
    )
    trunk = opened(bench)
    run_step(trunk)
    gradients = {name: torch.full_like(tensor, 0.5) for name, tensor in _client_parameters(bench).items()}
    trunk.ready(0, 0, 14, 1.0, trunk.seal(BOUNDARY.update(gradients)))
    done = trunk.next_event()
    assert done.tensors.keys() == gradients.keys()
    assert all(torch.equal(done.tensors[name], gradients[name]) for name in gradients)


def test_evaluating_is_exact_and_leaves_the_step_alone(bench):
    bench = bench(adapter={"dropout": 0.5})
    trunk = opened(bench)
    here = where(number=0, count=2)
    get(trunk.forward(here, trunk.seal(BOUNDARY.hidden(values(0)))))
    evaluated = get(trunk.evaluate(where(7), trunk.seal(BOUNDARY.hidden(values(5)))))
    assert torch.equal(evaluated, bench.direct.run(values(5), values(0))[0])
    get(trunk.backward(here, trunk.seal(BOUNDARY.gradient(values(100)))))


def test_rounds_follow_their_steps_and_the_run_ends(bench):
    bench = bench()
    trunk = opened(bench)
    sent = {name: torch.full_like(tensor, 0.25) for name, tensor in _client_parameters(bench).items()}
    for step in range(2):
        if step:
            assert trunk.next_event() == m.StepOpen(step, 0)
        run_step(trunk, step)
        finish_step(trunk, step)
        assert trunk.next_event() == m.RoundOpen(step)
        trunk.update(step, 14, trunk.seal(BOUNDARY.update(sent)))
        result = trunk.next_event()
        assert isinstance(result, m.RoundResult)
        assert result.round == step
        assert all(torch.equal(result.tensors[name], sent[name]) for name in sent)
    assert trunk.next_event() == m.Finished(2)


def _client_parameters(bench: Bench) -> dict[str, torch.Tensor]:
    plan = bench.federation.plan
    return load_segments(plan, open_checkpoint(plan.model.path), "a", "cpu").parameters()


def test_no_input_gradient_comes_when_nothing_below_the_cut_is_trained(bench):
    bench = bench(adapter={"input": "frozen"})
    [(_, first), (_, second)] = run_step(opened(bench))
    assert first is None
    assert second is None


def test_a_client_that_missed_the_outcome_is_told_again_after_a_restart(bench):
    bench = bench()
    trunk = opened(bench)
    run_step(trunk)
    done = finish_step(trunk)
    bench.close()
    again = bench.trunk(Standing(next_step=0, prepared_step=0))
    assert again.next_event() == Connected()
    again.ready(0, 0, 14, 2.5, again.seal(BOUNDARY.update({})))
    told = again.next_event()
    assert isinstance(told, m.StepDone)
    assert (told.step, told.num_target_tokens, told.clip_coefficient) == (0, 14, done.clip_coefficient)


def test_a_step_that_the_trunk_lost_is_opened_again_for_a_client_that_was_ready(bench):
    trunk = bench().trunk(Standing(next_step=0, prepared_step=0))
    assert trunk.next_event() == Connected()
    trunk.ready(0, 0, 14, 2.5, trunk.seal(BOUNDARY.update({})))
    assert trunk.next_event() == m.StepOpen(0, 0)
    run_step(trunk)
    finish_step(trunk)


def test_a_release_is_sealed_once(bench):
    trunk = opened(bench())
    release = BOUNDARY.hidden(values(0))
    trunk.seal(release)
    with pytest.raises(UnprotectedRelease, match="twice"):
        trunk.seal(release)
