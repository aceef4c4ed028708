"""What an audit makes before its attacks: only what they need, and never without saying how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.audit import settings
from fedsea.audit.attacker import Attacker
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions, Clock
from tests.support.audited import PLAN, TINY, noised_plan

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
