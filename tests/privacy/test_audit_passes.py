"""An audit attacks as many passes over a text as the plan makes, also where it does not send them all itself."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsea.audit import settings
from fedsea.audit.attacks import a4_averaging, a5_labels
from fedsea.audit.canaries import Texts
from fedsea.audit.curves import attacker_of, guesses_of, norm_of
from fedsea.audit.observe import Passed, Tap
from fedsea.audit.passes import Passes, as_mean, passes_of
from fedsea.audit.run import audit
from fedsea.audit.scoring import score
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject, variant
from fedsea.plan import FederationPlan
from fedsea.types import Channel
from tests.support.attacked import attacker_of as knowing
from tests.support.attacked import noised, plan_of, recovery, targets_of, texts
from tests.support.audited import PLAN, TINY, noised_plan, observe


def _hidden_alone(folder: Path, rounds: int, rho: float) -> Path:
    """A plan that only trains, with noise of so many times the hidden states' norm and no gradients."""
    audited = observe(count=2)
    norm = norm_of(audited.attacker, audited.targets)
    std = rho * norm / math.sqrt(open_subject(PLAN).checkpoint.hidden_size)
    file = noised_plan(folder, hidden_std=round(std, 3), gradient_std=0.0)
    text = file.read_text().replace("[adapter]", '[adapter]\ninput = "frozen"\ntrunk = "frozen"')
    text = text.replace('sync = "step"', 'sync = "personal"') + "\n[inference]\nenabled = false\n"
    file.write_text(re.sub(r"rounds = \d+", f"rounds = {rounds}", text))
    return file


def _noting(plan: FederationPlan, passes: float) -> Passed:
    """Makes each pass that is sent stand for so many."""
    return lambda target, seen, tapped: target.means.append(as_mean(seen, tapped, plan, passes))


def test_noise_that_averages_out_over_the_plans_steps_is_exposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(TINY, canaries=2))
    report = audit(AuditOptions(_hidden_alone(tmp_path, 100, 20.0), quick=True, attacks=("A4",)))
    assert report.by_attack()["A4"]["hidden"]["excess"] > 0.5  # of 2 passes alone it is below 0.2
    assert (report.about["passes"], report.about["passes_sent"]) == (2000, TINY.epochs)
    (said,) = (sentence for sentence in report.sentences if "put together" in sentence)
    assert "put together 2000 passes over each text (2 were sent, and their noise made smaller" in said


def test_a_few_passes_stand_for_as_many_as_are_really_sent(tmp_path: Path) -> None:
    subject = open_subject(_hidden_alone(tmp_path, 100, 4.0))
    plan = variant(subject.plan, subject.name)
    shown = observe(count=3, tokens=16)
    attacker = attacker_of(
        subject, subject.partition, subject.noise_std(), shown.texts, AuditOptions(PLAN, quick=True), plan
    )
    found = []
    for sent in (20, 2):
        targets = [replace(target, observations=[], means=[]) for target in shown.targets]
        tap = Tap(plan, subject.checkpoint, subject.name, key=b"s" * 32)
        tap.observe(targets, sent, passed=_noting(plan, 20 / sent))
        answers = a4_averaging.run(attacker, targets)
        found.append(score(targets, answers, guesses_of(attacker, targets), shown.texts.decode).recovery.value)
        variance = torch.cat([a4_averaging.averaged(attacker, target).variance_T for target in targets])
        torch.testing.assert_close(variance, torch.full_like(variance, subject.noise_std()[Channel.HIDDEN] ** 2 / 20))
        rows = [a4_averaging.averaged(attacker, target).rows_TH - attacker.clean(target.ids_T) for target in targets]
        assert abs(float(torch.cat(rows).std()) / float(variance[0].sqrt()) - 1) < 0.05
    assert abs(found[0] - found[1]) < 0.2


def test_labels_come_back_through_gradients_of_many_passes(base_model: Path) -> None:
    plain = targets_of(texts(3, 16))
    plan = plan_of(base_model, 1, 1)
    clean = Tap(plan, knowing(plan).base.checkpoint).observe(plain)
    scale = float(torch.cat([pair[1].raw_TH for pair in clean]).square().mean().sqrt())
    plan = plan_of(base_model, 1, 1, **noised(gradient_std=8 * scale))
    found = []
    for passes in (1.0, 400.0):
        targets = targets_of(texts(3, 16))
        Tap(plan, knowing(plan).base.checkpoint, key=b"g" * 32).observe(targets, 2, passed=_noting(plan, passes))
        assert targets[0].means[0].hidden_passes == 1.0  # hidden states have no noise here
        found.append(recovery(targets, a5_labels.run(knowing(plan), targets)))
    assert found[1] > found[0] + 0.4


def test_what_the_mean_of_passes_is_taken_of_is_clipped(tmp_path: Path) -> None:
    subject = open_subject(noised_plan(tmp_path, 1.0, 0.01, "hidden_clip = 20.0\ngradient_clip = 0.05\n"))
    plan = variant(subject.plan, subject.name)
    (target,) = Texts(subject.tokenizer, subject.plan, 32).canaries(1, 0)
    seen, tapped = Tap(plan, subject.checkpoint, subject.name, key=b"c" * 32).send(target)
    mean = as_mean(seen, tapped, plan, 1e12)
    assert mean.gradient_TH is not None
    assert float(mean.hidden_TH.norm()) == pytest.approx(20.0, rel=1e-3)
    assert float(mean.gradient_TH.norm()) <= 0.05 * 1.001


def test_a_run_says_how_often_its_silo_is_gone_through(tmp_path: Path) -> None:
    subject = open_subject(_hidden_alone(tmp_path, 100, 1.0))
    assert passes_of(subject, 4).attacked == 2000
    assert passes_of(replace(subject, epochs=37), 4).attacked == 37
    assert passes_of(replace(subject, epochs=1), 4).attacked == 4  # never fewer than were sent
    assert passes_of(open_subject(PLAN), 4) == Passes(
        1, 1, "without noise on what they look at one tells as much as all"
    )
