"""Attack A3: a learned inverter reads what can be read, says whether it was done learning, and invents nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsea.audit.attacks import a3_inverter
from tests.support.attacked import attacker_of, noised, observed, plan_of, recovery, targets_of, texts


def test_an_inverter_learns_to_read_and_less_of_it_through_noise(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(a3_inverter, "_PUBLIC_TOKENS", 240 * 20)  # as there are, so that none has to be sampled
    monkeypatch.setattr(a3_inverter, "_MOST_STEPS", 120)
    public = texts(240, 20, seed=9)
    scale = float(attacker_of(plan_of(base_model, 0)).clean(public[0]).square().mean().sqrt())
    found = []
    for rho in (0.0, 4.0):
        plan = plan_of(base_model, 0, 1, **(noised(hidden_std=rho * scale, gradient_std=1.0) if rho else {}))
        targets = observed(plan, targets_of(texts(8, 20)))
        attacker = attacker_of(plan, public=public, budget_s=1000.0)
        found.append(recovery(targets, a3_inverter.run(attacker, targets)))
    assert found[0] > 0.95
    assert found[1] < found[0] - 0.2


def test_an_inverter_is_trained_on_rows_that_are_clipped_like_those_that_it_reads(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(a3_inverter, "_PUBLIC_TOKENS", 240 * 20)
    monkeypatch.setattr(a3_inverter, "_MOST_STEPS", 150)
    public = texts(240, 20, seed=9)
    norm = float(attacker_of(plan_of(base_model, 0)).clean(public[0]).norm(dim=1).mean())
    noise = noised(hidden_std=1e-4 * norm, hidden_clip=0.05 * norm, unit="token")
    plan = plan_of(base_model, 0, 1, **noise, adapter={"input": "frozen", "trunk": "frozen"})
    targets = observed(plan, targets_of(texts(8, 20)))
    attacker = attacker_of(plan, public=public, budget_s=1000.0)
    answers = a3_inverter.run(attacker, targets)
    assert recovery(targets, answers) > 0.9
    assert not any(answer.cut_short for answer in answers)  # it made all its steps


def test_a_time_that_was_too_short_is_said(base_model: Path) -> None:
    plan = plan_of(base_model, 0, 1)
    targets = observed(plan, targets_of(texts(2, 12)))
    attacker = attacker_of(plan, public=texts(240, 12, seed=9), budget_s=0.3)
    answers = a3_inverter.run(attacker, targets)
    (note,) = {answer.note for answer in answers}
    assert "not converged" in note
    assert all(answer.cut_short for answer in answers)


def test_missing_public_text_is_sampled_from_the_public_model(base_model: Path) -> None:
    attacker = attacker_of(plan_of(base_model, 0, 1), budget_s=0.0)
    torch.manual_seed(0)
    sampled = a3_inverter.public_texts(attacker, 16)
    assert [len(ids_T) for ids_T in sampled] == [16] * 64
    assert all(int(ids_T[0]) == 1 for ids_T in sampled)
