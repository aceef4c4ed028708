"""The audit looks at what leaves in use too: prompts and answers, under the plan's noise and the sessions' own clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.audit import settings
from fedsea.audit.attacks import a1_nearest, a2_likelihood, a10_answers
from fedsea.audit.canaries import Texts
from fedsea.audit.checks import check_taps
from fedsea.audit.curves import attacker_of, guesses_of
from fedsea.audit.observe import Tap, Tapped
from fedsea.audit.report import write_report
from fedsea.audit.run import audit
from fedsea.audit.scoring import score
from fedsea.audit.sessions import Use, use
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import Subject, open_subject, variant
from fedsea.audit.verdict import Finding, Verdict
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel, Origin, Purpose, Release
from tests.support.audited import ONE_TEXT, PLAN, noised_plan, tiny_audits

CLIPS = "hidden_clip = 8.0\ngradient_clip = 8.0\n"
HIDDEN, GRADIENT = "hidden states", "gradients"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_audits(monkeypatch, ONE_TEXT)


class Faulty:
    """A boundary that is as it should be in training, and not in use."""

    def __init__(self, plan: Any, name: str, fault: str) -> None:
        self._right = Boundary.of(plan, name, key=b"k" * 32)
        self._open = Boundary.of(open_subject(PLAN).plan, name)
        self._gradients = Boundary.of(plan, name, key=b"g" * 32)
        self._again = lambda: Boundary.of(plan, name, key=b"a" * 32)
        self._once_more = {
            f"that of {what}": Boundary.of(plan, name, key=key * 32) for what, key in ((HIDDEN, b"k"), (GRADIENT, b"g"))
        }
        self.statement, self._fault = "", fault

    def hidden(self, rows: torch.Tensor, origin: Origin) -> Release:
        if origin.purpose is not Purpose.INFERENCE:
            return self._right.hidden(rows, origin)
        match self._fault:
            case "no noise":
                return self._open.hidden(rows, origin)
            case "no session's clip":  # every message clipped as if it were a whole sequence
                return self._right.hidden(rows, replace(origin, most_rows=0))
            case "the same noise":
                return self._again().hidden(rows, origin)
            case fault:
                return self._once_more[fault].hidden(rows, origin)

    def gradient(self, rows: torch.Tensor, origin: Origin) -> Release:
        return self._gradients.gradient(rows, origin)

    def update(self, tensors: Any) -> Release:
        return self._right.update(tensors)


def _with_inference(folder: Path, line: str) -> Path:
    file = folder / "plan.toml"
    text = PLAN.read_text().replace('path = "model"', f'path = "{PLAN.parent / "model"}"')
    file.write_text(f"{text}\n[inference]\n{line}\n")
    return file


def _asked(file: Path, count: int = 6, boundary: Any = None) -> tuple[Subject, list[Use], Texts]:
    subject = open_subject(file)
    texts = Texts(subject.tokenizer, subject.plan, 32)
    plan = variant(subject.plan, subject.name)
    tap = Tap(plan, subject.checkpoint, subject.name, boundary=boundary, key=b"t" * 32)
    return subject, use(tap, texts.canaries(count, 0)), texts


def _released(used: list[Use]) -> list[Tapped]:
    return [tapped for one in used for tapped in one.taps]


def test_prompts_and_answers_leave_token_by_token_and_as_they_were_computed() -> None:
    subject, used, _ = _asked(PLAN, 2)
    for one in used:
        assert [len(tapped.seen_TH) for tapped in one.taps] == [one.begins] + [1] * 7
        assert len(one.target.ids_T) == one.begins + 7 == one.target.observations[0].length
        assert torch.equal(torch.cat([tapped.raw_TH for tapped in one.taps]), one.target.observations[0].hidden_TH)
    assert check_taps(subject, {}, {}, _released(used)) == []


@pytest.mark.parametrize("extra", ["", CLIPS])
def test_noise_and_clip_are_found_to_be_as_planned_in_use(tmp_path: Path, extra: str) -> None:
    subject, used, _ = _asked(noised_plan(tmp_path, 2.0, 2.0, extra))
    assert check_taps(subject, {}, {}, _released(used)) == []


@pytest.mark.parametrize(
    ("fault", "extra", "said"),
    [
        ("no noise", "", "configured but not applied"),
        ("no session's clip", CLIPS, "has a standard deviation of"),
        ("the same noise", CLIPS, "used twice"),
    ],
)
def test_a_fault_of_the_boundary_in_use_alone_is_broken(tmp_path: Path, fault: str, extra: str, said: str) -> None:
    file = noised_plan(tmp_path, 0.05, 2.0, extra)
    plan = open_subject(file)
    subject, used, _ = _asked(file, boundary=Faulty(variant(plan.plan, plan.name), plan.name, fault))
    findings = check_taps(subject, {}, {}, _released(used))
    assert {finding.verdict for finding in findings} == {Verdict.BROKEN}
    assert any(said in finding.sentence and "in use" in finding.sentence for finding in findings)


@pytest.mark.parametrize("extra", ["", CLIPS])
@pytest.mark.parametrize("what", [HIDDEN, GRADIENT])
def test_noise_of_training_that_comes_again_in_use_is_broken(tmp_path: Path, what: str, extra: str) -> None:
    """Once in training and once in use: each by itself looks as it should."""
    file = noised_plan(tmp_path, 2.0, 2.0, extra)
    subject = open_subject(file)
    plan = variant(subject.plan, subject.name)
    targets = Texts(subject.tokenizer, subject.plan, 32).canaries(3, 0)

    def checked(boundary: Any, key: bytes = b"t" * 32) -> list[list[Finding]]:
        tap = Tap(plan, subject.checkpoint, subject.name, boundary=boundary, key=key)
        pairs = tap.observe(targets)
        taps = {Channel.HIDDEN: [pair[0] for pair in pairs], Channel.GRADIENT: [pair[1] for pair in pairs]}
        used = _released(use(tap, targets))
        return [check_taps(subject, taps, {}), check_taps(subject, {}, {}, used), check_taps(subject, taps, {}, used)]

    assert checked(None) == [[], [], []]
    training, in_use, (finding,) = checked(Faulty(plan, subject.name, f"that of {what}"))
    assert training == in_use == []
    assert finding.verdict is Verdict.BROKEN
    assert f"The same noise was used on {what} of training and on hidden states in use" in finding.sentence


def test_the_audit_of_a_plan_whose_noise_is_left_out_in_use_is_broken(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, 400.0, 400.0, "update_std = 1.0\n")
    subject = open_subject(file)
    boundary: Any = Faulty(variant(subject.plan, subject.name), subject.name, "no noise")
    found = audit(AuditOptions(file, quick=True, attacks=("A1",)), boundary=boundary)
    assert found.verdict is Verdict.BROKEN
    (finding,) = found.findings  # training is in order
    assert "hidden states in use" in finding.sentence
    a1 = found.by_attack()["A1"]
    assert a1["hidden"]["recovery"] < 0.2
    assert a1["session"]["recovery"] > 0.95


def test_the_clip_of_a_session_alone_hides_nothing(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, 0.005, 2.0, CLIPS)
    subject, used, texts = _asked(file, 1)
    raw, seen = used[0].taps[0].raw_TH, used[0].taps[0].seen_TH
    assert float(raw.norm()) > 3 * float(seen.norm())  # the clip binds, on every row by itself
    noise = {Channel.HIDDEN: 0.005}
    options = AuditOptions(file, quick=True)
    attacker = attacker_of(subject, subject.partition, noise, texts, options, variant(subject.plan, subject.name))
    targets = [one.target for one in used]
    found = score(targets, a2_likelihood.run(attacker, targets), guesses_of(attacker, targets), texts.decode)
    assert found.recovery.value > 0.97


def test_noise_hides_the_prompt_and_not_the_answer(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, 400.0, 400.0)
    subject, used, texts = _asked(file, 1)
    attacker = attacker_of(subject, subject.partition, subject.noise_std(), texts, AuditOptions(file, quick=True))
    targets = [one.target for one in used]
    nearest = score(targets, a1_nearest.run(attacker, targets), guesses_of(attacker, targets), texts.decode)
    assert nearest.recovery.value < 0.1
    answers = [one.answer for one in used]
    read = score(answers, a10_answers.run(attacker, answers), a10_answers.guesses(attacker, answers), texts.decode)
    assert read.recovery.value > 0.99
    assert read.num_tokens == 8
    assert read.excess_share.value > 0.5


def test_answers_that_the_server_reads_make_the_verdict_whatever_the_noise(tmp_path: Path) -> None:
    file = noised_plan(tmp_path, 400.0, 400.0, "update_std = 1.0\n")
    found = audit(AuditOptions(file, quick=True, attacks=("A1", "A10")))
    a1, a10 = found.by_attack()["A1"], found.by_attack()["A10"]
    assert {a1[channel]["verdict"] for channel in ("hidden", "session")} == {Verdict.NOT_RECOVERED.value}
    assert list(a10) == ["session"]
    assert a10["session"]["verdict"] == "EXPOSED"
    assert a10["session"]["excess"] == pytest.approx(a10["session"]["recovery"] - a10["session"]["prior"], abs=1e-5)
    assert found.verdict is Verdict.EXPOSED
    assert "inference.enabled = false" in found.sentences[-1]
    page = write_report(found, tmp_path / "out").read_text()
    assert "<td>A10 answers from the server&#39;s own outputs</td><td>session</td>" in page
    assert "A3, A4 and A6 are run on training alone" in page


def test_own_texts_are_asked_too_and_scored_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(ONE_TEXT, texts=1, sessions=2))
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "The parcel for the third floor came on Friday."}\n')
    found = audit(AuditOptions(PLAN, quick=True, attacks=("A1", "A10"), texts=(own,)))
    for attack, channel in (("A1", "hidden"), ("A1", "session"), ("A10", "session")):
        sets = found.by_attack()[attack][channel]["sets"]
        assert list(sets) == ["planted", "own texts"]
        assert sets["own texts"]["recovery"] > 0.95
        assert not sets["own texts"]["num_identifiers"]
    originals = [example["original"] for example in found.examples]
    assert any(text.startswith("The parcel") for text in originals)
    page = write_report(found, tmp_path / "out").read_text()
    assert "<td>A10, own texts</td><td>session</td>" in page


def test_an_answer_that_was_not_asked_about_leaves_the_verdict_open(tmp_path: Path) -> None:
    found = audit(AuditOptions(noised_plan(tmp_path, 400.0, 400.0), quick=True, attacks=("A10",)))
    assert "anything on the hidden channel" in found.skipped  # answers tell nothing about training
    assert found.by_attack()["A10"]["session"]["verdict"] == "EXPOSED"


@pytest.mark.parametrize(("most", "rows"), [(9, [5, 1, 1, 1]), (3, [2])])
def test_short_sessions_still_have_a_prompt(tmp_path: Path, most: int, rows: list[int]) -> None:
    file = _with_inference(tmp_path, f"max_tokens = {most}")
    _, used, _ = _asked(file, 1)
    assert [len(tapped.seen_TH) for tapped in used[0].taps] == rows
    assert used[0].begins > used[0].target.begins


def test_sessions_too_short_for_a_prompt_leave_the_verdict_open_with_a_sentence(tmp_path: Path) -> None:
    found = audit(AuditOptions(_with_inference(tmp_path, "max_tokens = 2"), quick=True, attacks=("A10",)))
    assert found.by_attack()["A10"]["session"]["status"] == "skipped"
    assert any("too short for a prompt and its answer: raise inference.max_tokens" in said for said in found.sentences)
    assert not any("--minutes" in said for said in found.sentences)


def test_a_plan_without_inference_has_nothing_that_leaves_in_use(tmp_path: Path) -> None:
    report = audit(AuditOptions(_with_inference(tmp_path, "enabled = false"), quick=True, attacks=("A1",)))
    found = report.by_attack()
    assert found["A1"]["hidden"]["recovery"] > 0.95
    for attack in ("A1", "A10"):
        session = found[attack]["session"]
        assert (session["status"], session["reason"]) == ("not applicable", "the plan allows no inference")
    assert "the verdict is about training alone" in report.sentences[-1]
