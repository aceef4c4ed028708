"""Soundness of attack A5: the gradient at the trunk's output gives the text away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsea.audit.attacks import a5_labels
from fedsea.audit.attacks.label_decoding import NO_LABEL, decode_labels
from fedsea.audit.training import SplitRun, batches_of
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.rowwise import own_jacobians
from fedsea.types import IGNORE
from tests.support.attacked import attacker_of, noised, observed, plan_of, recovery, targets_of, texts


def hidden_scale(folder: Path, k: int) -> float:
    """Root mean square of a hidden state's values: noise of this standard deviation is rho = 1."""
    rows_TH = attacker_of(plan_of(folder, k)).clean(texts(1, 40)[0])
    return float(rows_TH.square().mean().sqrt())


@pytest.mark.parametrize("rho", [0.0, 4.0])
@pytest.mark.parametrize("m", [0, 1, 2])
def test_gradients_without_noise_name_every_token_whatever_the_forward_channel_has(
    base_model: Path, m: int, rho: float
) -> None:
    noise = noised(hidden_std=rho * hidden_scale(base_model, 1)) if rho else {}
    plan = plan_of(base_model, 1, m, **noise)
    targets = observed(plan, targets_of(texts(4, 20)))
    assert recovery(targets, a5_labels.run(attacker_of(plan), targets)) >= 0.99


@pytest.mark.parametrize(("codec", "least"), [("bf16", 0.99), ("fp16", 0.99), ("int8", 0.95)])
def test_a_coarse_codec_of_the_gradients_hides_little(base_model: Path, codec: str, least: float) -> None:
    plan = plan_of(base_model, 1, 1, wire={"hidden": codec, "gradient": codec})
    targets = observed(plan, targets_of(texts(4, 20)))
    assert recovery(targets, a5_labels.run(attacker_of(plan), targets)) >= least


def test_what_later_labels_send_back_is_explained_to_rounding(base_model: Path) -> None:
    """With output blocks a row's gradient also carries what later labels sent back to it."""
    plan = plan_of(base_model, 1, 2)
    (target,) = observed(plan, targets_of(texts(1, 24)))
    seen = target.observations[0]
    assert seen.gradient_TH is not None
    assert seen.output_TH is not None
    blocks = attacker_of(plan).output_blocks
    whole = decode_labels(blocks, seen.output_TH, seen.gradient_TH, (24,))
    # The same rows without the later ones: what those sent back stays in, and no label explains it.
    cut = decode_labels(blocks, seen.output_TH[:12], seen.gradient_TH[:12], (12,))
    assert torch.equal(whole.labels_T[:-1], target.ids_T[1:])
    assert whole.residual_std < 1e-5 < 1e-2 < cut.residual_std


def test_a_rows_own_jacobian_is_that_of_its_row_alone(base_model: Path) -> None:
    blocks = attacker_of(plan_of(base_model, 1, 2)).output_blocks
    hidden_TH = torch.randn(5, blocks.hidden_size, generator=torch.Generator().manual_seed(0))
    found_THH = own_jacobians(blocks, hidden_TH)
    whole = torch.autograd.functional.jacobian(lambda x: blocks.final(x, (5,)), hidden_TH)
    for t in range(5):
        torch.testing.assert_close(found_THH[t], whole[t, :, t].T, rtol=1e-4, atol=1e-5)


def test_noise_on_the_gradients_lowers_recovery_and_epochs_raise_it_again(base_model: Path) -> None:
    scale = hidden_scale(base_model, 1)
    found = []
    for std, epochs in ((0.02, 1), (0.5, 1), (0.5, 8)):
        plan = plan_of(base_model, 1, 1, **noised(hidden_std=8 * scale, gradient_std=std))
        targets = observed(plan, targets_of(texts(3, 16)), epochs)
        found.append(recovery(targets, a5_labels.run(attacker_of(plan, beam=2), targets)))
    assert found[0] > found[2] > found[1] + 0.1


@pytest.mark.parametrize("hidden_std", [0.0, 1.0])
def test_when_the_time_is_up_the_passes_that_were_decoded_are_put_together_and_it_is_said(
    base_model: Path, hidden_std: float
) -> None:
    plan = plan_of(base_model, 1, 0, **noised(hidden_std=hidden_std, gradient_std=0.3))
    targets = observed(plan, targets_of(texts(2, 16)), 3, key=b"k" * 32)
    told: list[tuple[int, int]] = []
    late = attacker_of(plan, beam=2, budget_s=-1.0)
    hasty = a5_labels.run(late, targets, lambda done, total: told.append((done, total)))
    assert told[:3] == [(0, 6), (1, 6), (2, 6)]  # each text once, and then no more
    assert all(answer.cut_short for answer in hasty)
    assert all(answer.scored_T is not None and answer.scored_T.any() for answer in hasty)
    whole = a5_labels.run(attacker_of(plan, beam=2), targets)
    assert not any(answer.cut_short for answer in whole)
    assert recovery(targets, whole) > recovery(targets, hasty)


def test_both_noised_channels_together_say_more_than_the_backward_one(base_model: Path) -> None:
    std = 0.5 * hidden_scale(base_model, 1)
    plan = plan_of(base_model, 1, 1, **noised(hidden_std=std, gradient_std=0.5))
    targets = observed(plan, targets_of(texts(4, 24)))
    together = recovery(targets, a5_labels.run(attacker_of(plan, beam=2), targets))
    blind = attacker_of(plan)
    blind.noise_std = {channel: std for channel, std in blind.noise_std.items() if channel == "gradient"}
    assert together > recovery(targets, a5_labels.run(blind, targets)) + 0.1


def test_a_prompt_without_loss_stays_silent_and_is_not_scored(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1, data={"loss_on": "completion"})
    targets = observed(plan, targets_of(texts(4, 32), prompt=12))
    answers = a5_labels.run(attacker_of(plan), targets)
    for target, answer in zip(targets, answers, strict=True):
        assert answer.scored_T is not None
        assert answer.scored_T.tolist() == [False] * 13 + [True] * 19
        assert torch.equal(answer.ids_T[13:], target.ids_T[13:])


@pytest.mark.parametrize("both", [False, True])
def test_labels_that_noise_hides_count_as_missed(base_model: Path, both: bool) -> None:
    """Else the few rows in which the attack sees a label at all would be the only ones to judge it by."""
    noise = noised(hidden_std=100.0 if both else 0.0, gradient_std=3.0)
    plan = plan_of(base_model, 1, 1, data={"loss_on": "completion"}, **noise)
    targets = observed(plan, targets_of(texts(4, 32), prompt=12))
    answers = a5_labels.run(attacker_of(plan, beam=2), targets)
    for answer in answers:
        assert answer.scored_T is not None
        assert answer.scored_T.tolist() == [False] * 13 + [True] * 19
    assert recovery(targets, answers) < 0.3


def test_output_blocks_that_were_trained_are_still_read(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1, optimizer={"learning_rate": 3e-3})
    split = SplitRun(plan, open_checkpoint(plan.model.path))
    split.train(batches_of(texts(24, 32, seed=5), 8, 20))
    drifted = split.segments.parameters()
    assert any(float(t.abs().max()) > 1e-3 for name, t in drifted.items() if "lora_B" in name)
    targets = observed(plan, targets_of(texts(4, 32)), parameters=drifted)
    assert recovery(targets, a5_labels.run(attacker_of(plan), targets)) >= 0.9


def test_pure_noise_in_place_of_gradients_gives_chance(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1)
    (target,) = observed(plan, targets_of(texts(1, 48)))
    seen = target.observations[0]
    assert seen.output_TH is not None
    noise_TH = torch.randn(seen.output_TH.shape, generator=torch.Generator().manual_seed(0))
    decoded = decode_labels(
        attacker_of(plan).output_blocks, seen.output_TH, noise_TH, (48,), noise_std_T=torch.ones(48)
    )
    assert float((decoded.labels_T[:-1] == target.ids_T[1:]).float().mean()) < 0.2
    assert decoded.labels_T[-1] == NO_LABEL


def test_a_plan_that_sends_no_gradients_leaves_nothing_to_score(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1, adapter={"input": "frozen", "trunk": "frozen"})
    targets = observed(plan, targets_of(texts(2, 16)))
    answers = a5_labels.run(attacker_of(plan), targets)
    assert all(answer.scored_T is not None and not answer.scored_T.any() for answer in answers)


def test_targets_of_the_helper_are_the_shifted_text() -> None:
    (target,) = targets_of(texts(1, 8), prompt=2)
    assert target.targets_T[:2].tolist() == [IGNORE, IGNORE]
    assert torch.equal(target.targets_T[2:-1], target.ids_T[3:])
