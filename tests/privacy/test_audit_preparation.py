"""What an audit makes before its attacks: only what they need, and never without saying how far it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.audit import curves, settings
from fedsea.audit.attacker import Attacker
from fedsea.audit.canaries import Texts
from fedsea.audit.observe import Tap
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import variant
from fedsea.client import setup
from fedsea.types import Partition
from tests.support.audited import PLAN, TINY, noised_plan, subject_of

BEFORE = [
    "opening the plan and the model",
    "self-check",
    "tapping the bytes",
    "prompts and answers",
    "texts for perplexity",
    "perplexity without the defence",
    "perplexity with the defence",
]


def _told(file: Path, *attacks: str) -> list[str]:
    """Names of the parts in the order in which they began; each has come to its end."""
    last: dict[str, tuple[int, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        last[what] = (done, total)

    audit(AuditOptions(file, quick=True, attacks=attacks), show)
    assert all(done == total for done, total in last.values())
    return list(last)


def test_texts_that_no_attack_needs_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", TINY)
    made: list[int] = []
    sampled = Attacker.sampled

    def counted(self, count, length, seed, *rest):
        made.append(count)
        return sampled(self, count, length, seed, *rest)

    monkeypatch.setattr(Attacker, "sampled", counted)
    told = _told(PLAN, "A1")
    assert told[: len(BEFORE)] == BEFORE
    assert made == [TINY.known]  # for perplexity


def test_known_texts_are_made_for_the_attack_that_aligns_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", TINY)
    told = _told(noised_plan(tmp_path, 1.0, 1.0), "A6")
    place = told.index("known texts")
    assert told[place : place + 3] == ["known texts", "tapping known texts", "A6 alignment by known texts, then A2"]
    assert "public texts" not in told


def test_what_is_prepared_between_attacks_takes_none_of_their_time() -> None:
    now = [0.0]
    clock = Clock(1.0, lambda *_: None, lambda: now[0])
    clock.start()
    with clock.stopped():
        now[0] = 50.0
    assert clock.left_s == 60.0
    now[0] = 60.0
    assert clock.left_s == 50.0


def test_the_models_of_a_cut_are_loaded_once_whatever_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(TINY, canaries=1, tokens=8, sessions=1, curve_sequences=1, rhos=(0.0, 0.1), curve_tokens=3)
    monkeypatch.setattr(settings, "QUICK", tiny)
    loaded: list[Partition] = []
    load = setup.load_segments

    def counted(plan: Any, checkpoint: Any, name: str, device: str) -> Any:
        loaded.append(plan.partition_of(name))
        return load(plan, checkpoint, name, device)

    monkeypatch.setattr(setup, "load_segments", counted)
    monkeypatch.setattr(curves, "cut_curves", lambda *_: None)  # each of its points is a cut of its own
    found = audit(AuditOptions(PLAN, quick=True, attacks=("A0",)))
    assert len(found.curves["noise"]) == 2
    assert loaded == [Partition(1, 0), subject_of().partition]  # the audit's own check, and what is audited


def test_a_tap_beside_another_sees_what_one_with_models_of_its_own_does() -> None:
    subject = subject_of()
    plan, under = variant(subject.plan, subject.name), variant(subject.plan, subject.name, hidden_std=0.5)
    texts = Texts(subject.tokenizer, subject.plan, 16)
    first = Tap(plan, subject.checkpoint)
    first.observe(texts.canaries(2, 0))
    seen = []
    for beside in (None, first):
        targets = texts.canaries(2, 1)
        tap = Tap(under, subject.checkpoint, key=b"k" * 32, beside=beside)
        tap.observe(targets)
        seen.append([tap.perplexity, *(target.observations[0] for target in targets)])
    assert seen[0][0] == seen[1][0] != first.perplexity
    for alone, together in zip(*(one[1:] for one in seen), strict=True):
        assert torch.equal(alone.hidden_TH, together.hidden_TH)
        assert torch.equal(alone.gradient_TH, together.gradient_TH)
    with pytest.raises(AssertionError, match="other models"):
        Tap(variant(subject.plan, subject.name, partition=Partition(2, 1)), subject.checkpoint, beside=first)
