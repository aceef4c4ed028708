"""A run folder is audited with what the client trained, under the plan that is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedsea.audit import settings
from fedsea.audit.run import audit
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import open_subject
from fedsea.audit.verdict import Verdict
from fedsea.client.run import train_alone
from fedsea.client.setup import ClientOptions
from tests.support.audited import PLAN, SILO, TINY


def test_a_run_is_audited_with_the_trained_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(TINY, known=8))
    text = PLAN.read_text().replace('path = "model"', f"path = {json.dumps(str(PLAN.parent / 'model'))}")
    plan = tmp_path / "plan.toml"
    plan.write_text(text.replace("rounds = 4", "rounds = 1").replace("steps_per_round = 20", "steps_per_round = 2"))
    rows = SILO.read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    run = tmp_path / "run"
    train_alone(plan, "bank", ClientOptions("", Path(), (tmp_path / "rows.jsonl",), run, evaluate=False))
    subject = open_subject(run)
    assert subject.name == "bank"
    assert subject.parameters is not None
    assert any(float(tensor.abs().max()) > 0 for name, tensor in subject.parameters.items() if "lora_B" in name)
    found = audit(AuditOptions(run, quick=True, attacks=("A1",)))
    assert found.about["trained"]
    assert found.about["client"] == "bank"
    assert found.verdict is Verdict.EXPOSED
