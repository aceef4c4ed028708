"""`fedsea audit`: its line of JSON, its page, its exit codes, and what never leaves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsea.audit import run, settings
from fedsea.audit.catalogue import IDS
from fedsea.audit.outcome import AuditReport
from fedsea.audit.settings import QUICK, AuditOptions
from fedsea.cli import main
from fedsea.cli.audit import _ATTACKS
from tests.support.audited import ONE_TEXT, PLAN, noised_plan, tiny_audits


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_audits(monkeypatch, ONE_TEXT)


def test_an_open_plan_is_exposed_in_one_line_of_json_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "QUICK", replace(ONE_TEXT, curve_sequences=1, rhos=(0.0, 1.0)))
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "zanzibar quokka marmalade, nobody else may read this line"}\n')
    out = tmp_path / "out"
    asked = ["audit", str(PLAN), "--quick", "--json", "--attacks", "a1,a5", "--text", str(own), "--out", str(out)]
    assert main.run(asked) == 21
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads(lines[-1])
    assert len(lines) == 1
    assert found["verdict"] == "EXPOSED"
    for attack, channel in (("A1", "hidden"), ("A5", "gradient")):
        figures = found["attacks"][attack][channel]
        assert figures["recovery"] > 0.95
        assert figures["excess"] == pytest.approx(figures["recovery"] - figures["prior"], abs=1e-5)
        low, high = figures["recovery_interval"]
        assert low <= figures["recovery"] <= high
    assert "zanzibar" not in lines[-1]
    assert {"without_defence", "with_defence", "client_alone"} == set(found["perplexity"])
    page, report = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert report["verdict"] == "EXPOSED"
    assert page.count("<svg") == 4
    assert not re.search(r'(?:src|href)="(?!#)', page)  # nothing is fetched
    assert 'class="right"' in page
    assert "no DP claim: trust.mode is trusted-server" in page
    assert [point["k"] for point in report["curves"]["k"]] == [0, 1, 2, 3]
    assert [point["rho"] for point in report["curves"]["noise"]] == [0.0, 1.0]


def test_the_exit_code_gates_a_run_at_the_level_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, audit = {}, run.audit

    def once(options: AuditOptions, *more: Any) -> AuditReport:
        if options not in made:
            made[options] = audit(options, *more)
        return made[options]

    monkeypatch.setattr(run, "audit", once)
    loud = noised_plan(tmp_path, hidden_std=400.0, gradient_std=400.0)
    asked = ["audit", str(loud), "--quick", "--quiet", "--attacks", "A1,A5", "--out", str(tmp_path / "out")]
    assert main.run([*asked, "--fail-on", "exposed"]) == 0
    exposed = ["audit", str(PLAN), "--quick", "--quiet", "--attacks", "A1", "--out", str(tmp_path / "out")]
    assert main.run([*exposed, "--fail-on", "broken"]) == 0
    assert main.run([*exposed, "--fail-on", "exposed"]) == 21
    assert len(made) == 2  # the level is no part of an audit


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsea.audit.run.audit", lambda *_: pytest.fail("an audit was begun"))
    (tmp_path / "file").write_text("")
    assert main.run(["audit", str(PLAN), "--quick", "--quiet", "--out", str(tmp_path / "file")]) == 4
    assert "a file is there" in capsys.readouterr().err


def test_an_audit_that_fails_leaves_no_empty_folder_and_says_that_nothing_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsea.audit.run.audit", interrupted)
    kept = tmp_path / "kept"
    kept.mkdir()
    for out in (tmp_path / "new" / "out", kept):
        assert main.run(["audit", str(PLAN), "--quick", "--quiet", "--out", str(out)]) not in (0, 22)
        assert capsys.readouterr().err == "Interrupted. Nothing was written.\n"
    assert list(tmp_path.iterdir()) == [kept]


def test_help_says_what_each_attack_is() -> None:
    assert all(f"{attack}: " in _ATTACKS for attack in IDS)


def test_help_says_how_long_an_audit_takes_that_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["audit", "--help"]) == 0
    said = " ".join(re.sub(r"[^\w.\- ]", " ", capsys.readouterr().out).split())
    assert f"{settings.FULL.minutes:g} if not given {QUICK.minutes:g} with --quick" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "A99"], "no attack A99"),
        (["--fail-on", "private"], "is no verdict"),
        (["--minutes", "0"], "above 0"),
        (["--client", "nobody"], "no client 'nobody'"),
        (["--text", "absent.jsonl"], "absent.jsonl"),
        (["--settings", "absent.toml"], "absent.toml"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["audit", str(PLAN), "--quick", "--quiet", "--out", str(tmp_path), *options]) in (2, 3)
    assert message in capsys.readouterr().err
