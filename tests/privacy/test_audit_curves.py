"""The curves are those of what was tapped, whatever defence the plan itself has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsea.audit import curves, settings
from fedsea.audit.canaries import Texts
from fedsea.audit.curves import Point, noise_curve
from fedsea.audit.observe import Tap
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject
from fedsea.audit.targets import unheard
from tests.support.audited import PLAN, TINY, noised_plan


def _curve(options: AuditOptions) -> list[Point]:
    subject = open_subject(options.path)
    texts = Texts(subject.tokenizer, subject.plan, TINY.tokens)
    targets, points = texts.canaries(2, 0), list[Point]()
    noise_curve(subject, targets, targets, texts, options, unheard, points)
    return points


def test_the_curve_of_noise_does_not_depend_on_the_plans_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its points have no clip, so none may be undone: without noise all is recovered, as from the plan without one."""
    monkeypatch.setattr(settings, "QUICK", replace(TINY, rhos=(0.0, 0.5)))
    clipped = _curve(AuditOptions(noised_plan(tmp_path, extra="hidden_clip = 2.0\n"), quick=True))
    assert clipped[0]["recovery"] >= 0.99
    assert clipped == _curve(AuditOptions(PLAN, quick=True))


def test_the_curve_of_noise_is_tapped_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(TINY, rhos=(0.0,)))
    devices: list[str] = []

    class Recorded(Tap):
        def __init__(self, *args: Any, device: str = "cpu", **more: Any) -> None:
            devices.append(device)
            super().__init__(*args, device=device, **more)

    monkeypatch.setattr(curves, "Tap", Recorded)
    _curve(AuditOptions(PLAN, quick=True, device="cpu:0"))
    assert devices
    assert set(devices) == {"cpu:0"}
