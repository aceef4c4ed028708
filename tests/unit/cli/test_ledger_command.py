"""`fedsea ledger`: what it shows of a ledger, and what it says where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsea.cli import main
from fedsea.client.accounts import POINTER
from fedsea.privacy.accountant import mu_of
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.pricing import Charge
from fedsea.storage import CheckpointStore
from fedsea.types import Channel, Purpose
from tests.unit.privacy.plans import CLAIMED, noised


def test_a_budget_half_spent_can_be_spent_as_much_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = noised({**CLAIMED, "epsilon": 8.0})
    half = mu_of(plan.noise.epsilon, plan.noise.delta) ** 2 / 2
    with Ledger(tmp_path, plan, "a", "run") as ledger:
        ledger.charge(Charge(Channel.HIDDEN, Purpose.TRAINING, 1, (("one", half),)))
    assert main.run(["ledger", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50 % of it spent (in squares of mu, which add up; epsilons do not)" in shown


def test_a_ledger_that_is_gone_is_to_be_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, gone = tmp_path / "run", tmp_path / "identity" / "ledger" / "0123"
    run.mkdir()
    with Ledger(gone, noised(), "a", "run"):
        pass
    note = {"plan_sha256": "0", "client": "a", "folder": str(gone), "count": 1, "hash": "0"}
    (run / POINTER).write_text(json.dumps(note))
    shutil.rmtree(gone)
    assert main.run(["ledger", str(run)]) == 4
    said = capsys.readouterr().err
    assert "Put the newest copy of that folder in its place, whole" in said
    assert "create it" not in said


def test_a_servers_run_has_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rounds").mkdir()
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(0, {}, {"rounds_done": 0, "plan": noised().to_json()})
    assert main.run(["ledger", str(tmp_path)]) == 2
    assert "is a server's run folder, and a server has no ledger" in capsys.readouterr().err
