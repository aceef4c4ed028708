"""A defence that is not there is found in the bytes; an audit that cannot see says so; one seed, one report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.audit import sessions, settings
from fedsea.audit.attacks import a1_nearest, a2_likelihood
from fedsea.audit.canaries import Texts
from fedsea.audit.checks import check_taps
from fedsea.audit.observe import Tap, Tapped
from fedsea.audit.outcome import AuditReport
from fedsea.audit.run import _Audit, audit
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import Subject, open_subject, variant
from fedsea.audit.targets import OutOfTime, Recovered
from fedsea.audit.verdict import Finding, Verdict
from fedsea.errors import ConfigError
from fedsea.federation.secure import Member
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel, Purpose, Release
from tests.support.audited import ONE_TEXT, PLAN, noised_plan, tiny_audits

CODECS = {Channel.HIDDEN: "fp32", Channel.GRADIENT: "fp32"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_audits(monkeypatch, ONE_TEXT)


class OneNoise:
    """A boundary that begins its keystream anew for every release."""

    def __init__(self, plan: FederationPlan) -> None:
        self._plan = plan
        self.statement = ""

    def _fresh(self) -> Boundary:
        return Boundary.of(self._plan, key=b"k" * 32)

    def hidden(self, rows: torch.Tensor, origin: Any) -> Release:
        return self._fresh().hidden(rows, origin)

    def gradient(self, rows: torch.Tensor, origin: Any) -> Release:
        return self._fresh().gradient(rows, origin)

    def update(self, tensors: Any) -> Release:
        return self._fresh().update(tensors)


class ByText(OneNoise):
    """Noise that is a function of the values: another for every text, and the same in every epoch."""

    def hidden(self, rows: torch.Tensor, origin: Any) -> Release:
        key = hashlib.sha256(rows.float().numpy().tobytes()).digest()
        return Boundary.of(self._plan, key=key).hidden(rows, origin)

    def gradient(self, rows: torch.Tensor, origin: Any) -> Release:
        return Boundary.of(self._plan).gradient(rows, origin)


class OneRow(OneNoise):
    """One row of noise for all of a sequence."""

    def _fresh(self) -> Boundary:
        made = Boundary.of(self._plan)
        add = made._generator.add
        made._generator.add = lambda rows, std: rows.float() + add(torch.zeros_like(rows[:1]), std)  # type: ignore[assignment,method-assign]
        return made


def _findings(
    plan_file: Path, boundary: Any = None, passes: int = 20, codecs: dict[Channel, str] = CODECS, epochs: int = 1
) -> list[Finding]:
    """What the checks say of some texts that go over the wire."""
    subject = open_subject(plan_file)
    targets = Texts(subject.tokenizer, subject.plan, 48).canaries(passes, 0)
    pairs = Tap(variant(subject.plan, subject.name), subject.checkpoint, boundary=boundary, key=b"t" * 32).observe(
        targets, epochs
    )
    return _checked(subject, pairs, codecs)


def _checked(subject: Subject, pairs: list[list[Tapped]], codecs: dict[Channel, str] = CODECS) -> list[Finding]:
    taps = {Channel.HIDDEN: [pair[0] for pair in pairs], Channel.GRADIENT: [pair[1] for pair in pairs]}
    return check_taps(subject, taps, codecs)


def test_noise_that_is_as_planned_is_found_to_be_so(tmp_path: Path) -> None:
    subject = open_subject(noised_plan(tmp_path))
    targets = Texts(subject.tokenizer, subject.plan, 48).canaries(20, 0)
    pairs = Tap(variant(subject.plan, subject.name), subject.checkpoint, key=b"t" * 32).observe(targets)
    for number, std in ((0, 2.0), (1, 0.01)):
        added = torch.cat([(pair[number].seen_TH - pair[number].raw_TH).flatten() for pair in pairs])
        assert added.numel() > 100_000  # so that a standard deviation is known to 0.3 %
        assert abs(float(added.std()) / std - 1) < 0.01
        assert abs(float(added.mean())) < 0.02 * std
        assert all(not torch.equal(pair[number].seen_TH, pair[number].raw_TH) for pair in pairs)
    assert _checked(subject, pairs) == []


def test_clipped_and_noised_rows_are_found_to_be_so(tmp_path: Path) -> None:
    clips = "hidden_clip = 40.0\ngradient_clip = 0.5\n"
    assert _findings(noised_plan(tmp_path, extra=clips)) == []


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_a_clipped_and_noised_update_is_found_to_be_so(tmp_path: Path, unit: str) -> None:
    file = noised_plan(tmp_path, extra=f'update_std = 0.05\nupdate_clip = 0.5\nunit = "{unit}"\n')
    text = file.read_text().replace("[adapter]", '[adapter]\ninput = "frozen"\ntrunk = "frozen"')
    file.write_text(text.replace("input_blocks = 1", "input_blocks = 0"))  # what a plan by tokens has to be
    subject = open_subject(file)
    tapped = Tap(variant(subject.plan, subject.name), subject.checkpoint, key=b"t" * 32).tap_update()
    assert tapped is not None
    assert float(tapped.raw_TH.norm()) > 0.5  # the clip binds
    assert check_taps(subject, {Channel.UPDATE: [tapped]}, CODECS) == []


def test_noise_that_is_configured_but_not_applied_is_reported(tmp_path: Path) -> None:
    file = noised_plan(tmp_path)
    found = audit(
        AuditOptions(file, quick=True, attacks=("A1",)), boundary=Boundary.of(open_subject(PLAN).plan, "clinic")
    )
    assert found.verdict is Verdict.BROKEN  # in use too, where it is a fault of fedsea itself
    said = [finding.sentence for finding in found.findings if finding.verdict is Verdict.EXPOSED]
    assert sum("configured but not applied" in sentence for sentence in said) == 2
    assert any("configured but not applied" in sentence for sentence in found.sentences)


def test_a_boundary_that_does_not_clip_is_refuted_by_the_test_of_the_noise(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, 4.0, 4.0, "hidden_clip = 2.0\ngradient_clip = 2.0\n")
    (tmp_path / "loose").mkdir()
    loose = Boundary.of(open_subject(noised_plan(tmp_path / "loose", 4.0, 4.0)).plan, "clinic")
    found = audit(AuditOptions(file, quick=True, attacks=("A9",)), boundary=loose)
    tests = found.by_attack()["A9"]["hidden"]["tests"]
    assert [(test["channel"], test["holds"]) for test in tests] == [("hidden", False), ("gradient", False)]


def test_a_channel_that_was_forgotten_is_reported_and_attacked(tmp_path: Path) -> None:
    found = audit(AuditOptions(noised_plan(tmp_path, hidden_std=8.0, gradient_std=0.0), quick=True, attacks=("A5",)))
    assert any("forgotten: hidden states get noise, but gradients" in f.sentence for f in found.findings)
    assert found.verdict is Verdict.EXPOSED
    by_attack = found.by_attack()
    assert by_attack["A5"]["gradient"]["recovery"] > 0.95


def test_noise_that_is_used_twice_is_reported(tmp_path: Path) -> None:
    file = noised_plan(tmp_path)
    findings = _findings(file, OneNoise(open_subject(file).plan))
    said = ["used twice", "used twice", "on hidden states and on gradients"]
    assert [words in finding.sentence for words, finding in zip(said, findings, strict=True)] == [True] * 3
    assert {finding.verdict for finding in findings} == {Verdict.EXPOSED}


def test_noise_that_comes_again_in_the_next_epoch_is_reported(tmp_path: Path) -> None:
    file = noised_plan(tmp_path)
    boundary = ByText(open_subject(file).plan)
    assert _findings(file, boundary, 4) == []
    (finding,) = _findings(file, boundary, 4, epochs=3)
    assert "used twice on hidden states" in finding.sentence


class Elsewhere(OneNoise):
    """Noise as planned on what trains; none on evaluation, and the same on the update of every round."""

    def __init__(self, plan: FederationPlan) -> None:
        super().__init__(plan)
        self._right, self._open = Boundary.of(plan), Boundary.of(open_subject(PLAN).plan)

    def hidden(self, rows: torch.Tensor, origin: Any) -> Release:
        return (self._open if origin.purpose is Purpose.EVALUATION else self._right).hidden(rows, origin)

    def gradient(self, rows: torch.Tensor, origin: Any) -> Release:
        return self._right.gradient(rows, origin)


def test_an_audit_looks_at_evaluation_and_at_more_than_one_update(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, hidden_std=60.0, gradient_std=0.5, extra="update_std = 0.5\n")
    text = file.read_text().replace('sync = "step"', 'sync = "round"')
    file.write_text(f"{text}\n[inference]\nenabled = false\n")
    subject = open_subject(file)
    boundary: Any = Elsewhere(variant(subject.plan, subject.name))
    found = audit(AuditOptions(file, quick=True, attacks=("A0",)), boundary=boundary)
    update, evaluation = found.findings  # hidden states and gradients of training are in order
    assert "used twice on updates" in update.sentence
    assert update.verdict is Verdict.EXPOSED
    assert "configured but not applied" in evaluation.sentence
    assert "on hidden states of evaluation" in evaluation.sentence
    assert evaluation.verdict is Verdict.BROKEN  # as in use


def test_noise_of_training_that_comes_again_in_evaluation_is_broken(tmp_path: Path) -> None:
    subject = open_subject(noised_plan(tmp_path))
    targets = Texts(subject.tokenizer, subject.plan, 32).canaries(3, 0)
    trained, again, other = (
        Tap(variant(subject.plan, subject.name), subject.checkpoint, key=key * 32) for key in (b"t", b"t", b"o")
    )
    taps = {Channel.HIDDEN: [trained.send(target)[1][0] for target in targets]}
    (finding,) = check_taps(subject, taps, CODECS, evaluated=again.evaluate(targets))
    assert finding.verdict is Verdict.BROKEN
    assert "used on hidden states of training and on hidden states of evaluation" in finding.sentence
    assert check_taps(subject, taps, CODECS, evaluated=other.evaluate(targets)) == []


def test_one_row_of_noise_for_a_whole_sequence_is_reported(tmp_path: Path) -> None:
    file = noised_plan(tmp_path)
    findings = _findings(file, OneRow(open_subject(file).plan), 4)
    for channel in ("hidden states", "gradients"):
        assert any(f"used twice on {channel}" in finding.sentence for finding in findings)


def test_noise_that_is_too_small_is_reported(tmp_path: Path) -> None:
    file = noised_plan(tmp_path)
    (tmp_path / "weak").mkdir()
    weaker = open_subject(noised_plan(tmp_path / "weak", hidden_std=1.9, gradient_std=0.0095)).plan
    findings = _findings(file, Boundary.of(weaker, "clinic"))
    assert [finding.verdict for finding in findings] == [Verdict.EXPOSED] * 2
    assert "and the plan says 2" in findings[0].sentence


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_coarse_codec_is_no_fault_of_the_noise_and_hides_none(tmp_path: Path, codec: str) -> None:
    file = noised_plan(tmp_path, hidden_std=0.05, gradient_std=1e-4)
    file.write_text(file.read_text() + f'\n[wire]\nhidden = "{codec}"\ngradient = "{codec}"\n')
    codecs = dict.fromkeys(CODECS, codec)
    assert [f for f in _findings(file, None, 8, codecs) if f.verdict is not Verdict.INCONCLUSIVE] == []
    off = _findings(file, Boundary.of(open_subject(PLAN).plan, "clinic"), 8, codecs)
    assert "configured but not applied" in off[0].sentence
    assert len(off) == 2  # nothing is passed over in silence


def test_an_audit_that_does_not_see_the_open_text_declares_itself_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(attacker: Any, targets: Any, progress: Any = None) -> list[Recovered]:
        return [Recovered(torch.zeros_like(target.ids_T)) for target in targets]

    monkeypatch.setattr(a1_nearest, "run", blind)
    found = audit(AuditOptions(PLAN, quick=True, attacks=("A1",)))
    assert found.verdict is Verdict.BROKEN
    assert found.verdict.exit_code == 23


def test_the_same_seed_gives_the_same_report_and_another_one_other_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(ONE_TEXT, tokens=8))
    monkeypatch.setattr(sessions, "_NEW_TOKENS", 3)
    options = AuditOptions(noised_plan(tmp_path, hidden_std=60.0), quick=True, attacks=("A1", "A4"), seed=5)
    first, again = audit(options), audit(options)
    assert json.dumps(first.to_json()) == json.dumps(again.to_json())
    assert first.examples == again.examples
    other = audit(replace(options, path=PLAN, seed=6, attacks=("A1",)))  # without noise, which is slow to search
    assert other.examples[0]["original"] != first.examples[0]["original"]


def test_without_any_time_the_first_attacks_are_run_and_the_others_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However loaded the machine is: the verdict needs A1 and A5, and says what else there was no time for."""
    monkeypatch.setattr(settings, "QUICK", replace(ONE_TEXT, tokens=8))
    found = audit(AuditOptions(noised_plan(tmp_path, 400.0, 400.0), quick=True, minutes=1e-6))
    status = {outcome.attack.id: outcome.status for outcome in found.outcomes}
    assert [attack for attack, state in status.items() if state == "run"] == ["A0", "A1", "A10", "A5"]
    assert {attack for attack, state in status.items() if state == "skipped"} == {"A2", "A3", "A4", "A6", "A7", "A8"}
    assert found.self_check is None
    assert found.to_json()["self_check"] is None
    (unseen,) = (one for one in found.findings if "no time for the audit's own check" in one.sentence)
    assert unseen.verdict is Verdict.INCONCLUSIVE
    assert found.verdict is Verdict.EXPOSED  # answers are read whatever the noise
    rest = replace(found, outcomes=tuple(one for one in found.outcomes if one.attack.id != "A10"))
    assert rest.verdict is Verdict.INCONCLUSIVE
    assert rest.verdict.exit_code == 22
    assert any("A8 (the time was up)" in sentence for sentence in found.sentences)
    assert any("give more --minutes" in sentence for sentence in found.sentences)


@pytest.mark.parametrize(("took_s", "recovery", "left_s"), [(100.0, 1.0, 140.0), (130.0, None, 110.0)])
def test_what_the_own_check_takes_is_counted_and_what_preparation_takes_is_not(
    monkeypatch: pytest.MonkeyPatch, took_s: float, recovery: float | None, left_s: float
) -> None:
    now = 0.0
    check, prepare = a1_nearest.run, _Audit._observe

    def slow_check(attacker: Any, targets: Any, progress: Any) -> list[Recovered]:
        nonlocal now
        now += took_s
        progress(0, 1)
        return check(attacker, targets)

    def slow_preparation(self: _Audit, targets: Any) -> Any:
        nonlocal now
        now += 1000.0
        return prepare(self, targets)

    clock = Clock(4.0, lambda *_: None, now=lambda: now)
    run = _Audit(open_subject(PLAN), AuditOptions(PLAN, quick=True), clock, None, None, Member)
    left: list[float] = []
    monkeypatch.setattr(a1_nearest, "run", slow_check)
    monkeypatch.setattr(_Audit, "_observe", slow_preparation)
    monkeypatch.setattr(run, "_attacks", lambda _: left.append(clock.left_s) or [])
    assert run.run().self_check == recovery
    assert left == [left_s]


def test_the_time_that_preparation_takes_is_not_the_attacks() -> None:
    now = 0.0
    clock = Clock(1.0, lambda *_: None, now=lambda: now)
    preparing = clock.watch("preparation")
    now = 1000.0
    preparing(0, 1)  # nothing ends before the start
    clock.start()
    assert clock.left_s == 60.0
    short, always = clock.watch("an attack", 0.5), clock.watch("A1", ends=False)
    now = 1030.0
    with pytest.raises(OutOfTime):
        short(0, 1)
    now = 2000.0
    always(0, 1)


def test_slow_attacks_leave_time_for_the_curves_and_what_was_not_drawn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(ONE_TEXT, curve_sequences=1, epochs=1))
    file = noised_plan(tmp_path, 40.0, 2.0)
    now = 0.0

    def slow(attacker: Any, targets: Any, progress: Any) -> list[Recovered]:
        nonlocal now
        while True:  # as slow as it may be
            now += 1.0
            progress(0, 1)

    monkeypatch.setattr(a2_likelihood, "run", slow)
    options = AuditOptions(file, quick=True, attacks=("A2",))
    clock = Clock(10.0, lambda *_: None, now=lambda: now)
    subject = open_subject(file)
    run = _Audit(subject, options, clock, None, None, Member)
    monkeypatch.setattr(run, "_self_check", lambda _: 1.0)
    found = run.run()
    assert {o.attack.id: o.reason for o in found.outcomes if o.status == "skipped"} == {"A2": "its time was up"}
    assert now >= 590.0  # the curves had all that was left
    assert [point["rho"] for point in found.curves["noise"]] == [0.0]  # A1 is not slow: what was done is kept
    assert any("before the curves of cut and noise were whole" in sentence for sentence in found.sentences)


def test_a_plan_that_trains_the_output_side_alone_has_a_closed_backward_channel(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    text = PLAN.read_text().replace('path = "model"', f'path = "{PLAN.parent / "model"}"')
    file.write_text(text.replace("rank = 16", 'rank = 16\ninput = "frozen"\ntrunk = "frozen"'))
    found: AuditReport = audit(AuditOptions(file, quick=True, attacks=("A1", "A5")))
    assert found.by_attack()["A5"]["gradient"]["reason"].startswith("the backward channel is closed")
    assert found.about["backward_channel"] == "closed at the cut"  # as the trust statement says: gradients of its own
    assert f"backward channel: {found.about['backward_channel']} " in found.statement
    assert found.verdict is Verdict.EXPOSED  # the forward channel is open


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no attack A77"):
        AuditOptions(PLAN, attacks=("A77",))
    with pytest.raises(ConfigError, match="above 0"):
        AuditOptions(PLAN, minutes=0.0)
    with pytest.raises(ConfigError, match="above 0"):
        AuditOptions(PLAN, minutes=float("nan"))
    with pytest.raises(ConfigError, match="holds no run of a client"):
        audit(AuditOptions(tmp_path, quick=True))
