"""Soundness 1, 3, 4 and 5: the forward attacks see what lies open, and see nothing where there is nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fedsea.audit import attacker
from fedsea.audit import verdict as v
from fedsea.audit.attacks import a1_nearest, a2_likelihood, a4_averaging, a6_alignment, search
from fedsea.audit.curves import norm_of
from fedsea.audit.subject import variant
from fedsea.model import adapters
from fedsea.types import Partition, SegmentKind
from tests.support.audited import SILO, observe, subject_of


@pytest.fixture(autouse=True)
def short_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """How large rows are, of as many positions as a text has here: the first are the same however many there are."""
    monkeypatch.setattr(attacker, "_PROFILED_TOKENS", 24)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_without_noise_the_nearest_candidate_is_the_text(k: int) -> None:
    found = observe(Partition(k, 1), tokens=16).score(a1_nearest)
    assert found.recovery.value >= 0.99
    assert found.exact >= 0.75
    assert v.of_score(found) is v.Verdict.EXPOSED


def test_pure_noise_gives_nothing_away() -> None:
    draw = torch.Generator().manual_seed(0)
    audited, few = (
        observe(change=lambda rows: torch.randn(rows.shape, generator=draw), count=count, tokens=tokens)
        for count, tokens in ((4, 24), (2, 12))
    )
    nearest, likeliest = audited.score(a1_nearest), few.score(a2_likelihood)
    assert nearest.recovery.value < 0.02
    assert likeliest.excess.value <= 0.0
    assert {v.of_score(nearest), v.of_score(likeliest)} == {v.Verdict.NOT_RECOVERED}


def test_one_text_attacked_and_another_scored_is_at_unigram_level() -> None:
    audited = observe(tokens=16)
    others = observe(tokens=16, silo=SILO.with_name("clinic.jsonl")).targets
    assert {len(target.ids_T) for target in (*audited.targets, *others)} == {16}
    most_common = Counter(torch.cat([target.ids_T for target in others]).tolist()).most_common(1)[0][1] / (4 * 16)
    assert audited.score(a1_nearest, others).recovery.value <= most_common
    assert audited.score(a1_nearest).recovery.value > 0.99


def test_recovery_falls_as_the_noise_grows() -> None:
    found = [observe(rho=rho, count=1, tokens=16).score(a2_likelihood).recovery.value for rho in (0.5, 2.0, 8.0)]
    assert found[0] > found[1] > found[2]
    assert found[0] > 0.9
    assert found[2] < 0.3


def test_a_clip_alone_hides_nothing() -> None:
    audited = observe(rho=0.01, clip=2.0, count=1, tokens=16)
    raw, seen = audited.taps[0][0].raw_TH, audited.taps[0][0].seen_TH
    assert raw.norm() > 3 * 2.0  # the clip is far below what leaves without it
    assert seen.norm() < 2.0 * 2.0
    assert audited.score(a2_likelihood).recovery.value > 0.8


def test_averaging_epochs_undoes_the_noise() -> None:
    audited = observe(rho=4.0, epochs=16, count=1, tokens=14)
    one, many = audited.score(a2_likelihood), audited.score(a4_averaging)
    assert many.recovery.value > one.recovery.value + 0.2
    assert many.recovery.value > 0.85


def test_a_shortlist_that_misses_the_truth_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_EXHAUSTIVE", 100)
    monkeypatch.setattr(search, "_SHORTLIST", 16)
    found = observe(rho=8.0, count=2, tokens=16).score(a2_likelihood)
    assert found.shortlist_recall < 0.995
    assert v.of_score(found) is v.Verdict.INCONCLUSIVE
    assert any("shortlist recall" in note for note in found.notes)


def test_a_large_vocabulary_is_searched_through_a_shortlist_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_EXHAUSTIVE", 100)
    monkeypatch.setattr(search, "_SHORTLIST", 256)
    found = observe(tokens=16).score(a1_nearest)
    assert found.shortlist_recall >= 0.995
    assert found.recovery.value >= 0.99


def test_a_secret_rotation_is_exposed() -> None:
    draw = torch.Generator().manual_seed(3)
    turn_HH = torch.linalg.qr(torch.randn(128, 128, generator=draw)).Q
    audited = observe(change=lambda rows: rows @ turn_HH, known=16, count=1, tokens=16)
    assert audited.score(a1_nearest).recovery.value < 0.1  # the rotation is on
    found = audited.score(a6_alignment)
    assert found.recovery.value >= 0.99
    assert v.of_score(found) is v.Verdict.EXPOSED


def test_private_adapters_do_not_hide_the_text() -> None:
    subject = subject_of()
    plan = variant(subject.plan, subject.name, partition=Partition(2, 1))
    draw = torch.Generator().manual_seed(4)
    shapes = adapters.trainable_shapes(
        subject.checkpoint.config, Partition(2, 1), (SegmentKind.INPUT, SegmentKind.OUTPUT), plan.adapter
    )
    drifted = {name: 0.042 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    audited = observe(Partition(2, 1), parameters=drifted, known=16, count=1, tokens=24)
    clean = torch.cat([audited.attacker.clean(target.ids_T)[1:] for target in audited.targets])
    seen = torch.cat([target.observations[0].hidden_TH[1:] for target in audited.targets])
    assert (seen - clean).norm() / clean.norm() > 0.25  # the client has moved away from the public weights
    assert audited.score(a1_nearest).recovery.value >= 0.9
    assert audited.score(a6_alignment).recovery.value >= 0.9


@pytest.mark.parametrize(
    ("unit", "k", "clip", "rho"),
    [("token", 0, 0.5, 0.4), ("sequence", 1, 1.5, 0.2)],
)
def test_known_texts_are_clipped_like_those_that_were_sent(unit: str, k: int, clip: float, rho: float) -> None:
    """Aligned with rows that no clip scaled, A6 found less than A2 does."""
    plain = observe(Partition(k, 1), count=2, tokens=20)
    norm = norm_of(plain.attacker, plain.targets)
    audited = observe(Partition(k, 1), rho=rho, count=2, tokens=20, clip=clip * norm, unit=unit, known=12)
    assert audited.score(a6_alignment).recovery.value >= 0.88
