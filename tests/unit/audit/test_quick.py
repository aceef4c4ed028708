"""The quick table says of every row that it lacks why it lacks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedsea.audit.attacks import a1_nearest, a2_likelihood, a5_labels
from fedsea.audit.quick import NO_LOSS, NO_TIME, quick_table
from fedsea.audit.targets import OutOfTime, Recovered, Target
from fedsea.plan import load_plan
from tests.support.audited import PLAN


def _right(_attacker: Any, targets: Sequence[Target], _progress: Any) -> list[Recovered]:
    return [Recovered(target.ids_T) for target in targets]


def _nothing_scored(_attacker: Any, targets: Sequence[Target], _progress: Any) -> list[Recovered]:
    return [Recovered(target.ids_T, torch.zeros(len(target.ids_T), dtype=torch.bool)) for target in targets]


def _too_slow(*_: Any) -> list[Recovered]:
    raise OutOfTime


def test_what_the_quick_table_lacks_is_named_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a1_nearest, "run", _right)
    monkeypatch.setattr(a5_labels, "run", _nothing_scored)
    monkeypatch.setattr(a2_likelihood, "run", _too_slow)
    found = quick_table(load_plan(PLAN), PLAN.parent / "model")
    assert [(row.channel, row.attack, row.recovery) for row in found.rows] == [("hidden", "A1", 1.0)]
    noise = "Gaussian noise, 0.5 of the hidden states' norm"
    assert [(left.defence, left.channel, left.why) for left in found.left_out] == [
        ("trusted-server", "gradient", NO_LOSS),
        (noise, "hidden", NO_TIME),
        (noise, "gradient", NO_LOSS),
    ]


def test_without_time_the_quick_table_lacks_every_row() -> None:
    found = quick_table(load_plan(PLAN), PLAN.parent / "model", limit_s=0.0)
    assert found.rows == ()
    assert [(left.channel, left.why) for left in found.left_out] == [("hidden", NO_TIME), ("gradient", NO_TIME)] * 2
