"""Which noise a run is audited with: that of its ledger, and of this run alone."""

from __future__ import annotations

from pathlib import Path

from fedsea.audit.applied import OF_THE_PLAN, applied
from fedsea.plan import FederationPlan
from fedsea.privacy.ledger import Ledger
from tests.support.attacked import noised, plan_of


def _plan(folder: Path) -> FederationPlan:
    return plan_of(folder, **noised(hidden_std=1.0, hidden_clip=4.0))


def _charged(run: Path, plan: FederationPlan, client: str, run_id: str, **stricter: float) -> None:
    with Ledger(run / "ledger", plan, client, run_id, plan.noise.model_copy(update=stricter)):
        pass


def test_a_run_has_the_noise_that_its_ledger_was_charged_with(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    _charged(tmp_path, plan, "a", "one", hidden_std=3.0)
    _charged(tmp_path, plan, "a", "two", hidden_std=2.0)  # the same identity, another run
    noise, where = applied(plan, "a", tmp_path, "one")
    assert (noise.hidden_std, where) == (3.0, "that of the run's ledger")


def test_a_run_whose_noise_changed_has_the_laxest_of_each_key(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    _charged(tmp_path, plan, "a", "one", hidden_std=3.0, hidden_clip=2.0)
    _charged(tmp_path, plan, "a", "one", hidden_std=2.0, hidden_clip=1.0)
    noise, where = applied(plan, "a", tmp_path, "one")
    assert (noise.hidden_std, noise.hidden_clip) == (2.0, 2.0)
    assert "several" in where


def test_without_the_runs_ledger_the_plans_noise_is_audited_and_that_is_said(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    assert applied(plan, "a", tmp_path, "one")[0] == plan.noise
    _charged(tmp_path, plan, "a", "two", hidden_std=3.0)
    for client, run_id in (("a", "one"), ("b", "two")):
        noise, where = applied(plan, client, tmp_path, run_id)
        assert noise == plan.noise
        assert "is not to be had from this folder" in where
    (tmp_path / "ledger" / "ledger.jsonl").write_bytes(b"damaged\n")
    assert applied(plan, "a", tmp_path, "two")[0] == plan.noise


def test_a_plan_without_noise_needs_no_ledger(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert applied(plan, "a", tmp_path, "one") == (plan.noise, OF_THE_PLAN)
