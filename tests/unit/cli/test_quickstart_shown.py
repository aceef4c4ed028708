"""What a quickstart says beside its figures: how long it takes, and what it had no time for."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console
from rich.console import Console

from fedsea.audit import quick
from fedsea.audit.quick import LeftOut, QuickTable, TableRow
from fedsea.cli import main
from fedsea.cli import quickstart as cli_quickstart
from fedsea.cli.parts import Parts
from fedsea.evaluation import quickstart

PLAN = Path(quickstart.__file__).parents[1] / "assets" / "plan.toml"


class Here:
    """Stands for the processes: does at once in this one what it is given, and keeps what that printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def call(self, name: str, function: Any, *arguments: str) -> None:
        assert name == "audit"
        function(*arguments)
        self._printed = self._capsys.readouterr().out

    def last_line(self, name: str, timeout_s: float) -> str:
        assert (name, timeout_s > 60) == ("audit", True)
        return self._printed.splitlines()[-1]


@pytest.mark.parametrize("beside", [True, False], ids=["in a process of its own", "at the end"])
def test_quickstart_says_which_rows_its_audit_lacks_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, beside: bool
) -> None:
    folder = tmp_path / "new"

    def run(*_: Any, audit: Any, begun: Any) -> SimpleNamespace:
        folder.mkdir()
        shutil.copy(PLAN, folder)
        if beside:
            begun(Here(capsys))
        cells = audit(None)
        assert [row[2] for row in cells] == ["tokens recovered", "100 %", "left out: no loss", "left out: no time"]
        return SimpleNamespace(to_json=lambda: "{}")

    row = TableRow("some defence", "hidden", "A1", 1.0, 0.25, 0.5, 7.0)
    left = (LeftOut("some defence", "gradient", "no loss"), LeftOut("other defence", "hidden", "no time"))
    monkeypatch.setattr(quick, "quick_table", lambda *_, now: QuickTable((row,), left))
    monkeypatch.setattr(quickstart, "run", run)
    assert main.run(["quickstart", "--folder", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["audit"] == [row.to_json()]
    assert result["audit_left_out"] == [
        {"defence": "some defence", "channel": "gradient", "why": "no loss"},
        {"defence": "other defence", "channel": "hidden", "why": "no time"},
    ]
    monkeypatch.setenv("COLUMNS", "120")
    cli_quickstart._show_audit(QuickTable((row,), left), folder)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "left out: " in line]
    shown = [" ".join(line.replace("│", " ").split()) for line in lines]
    assert shown == ["some defence gradient, no noise left out: no loss", "other defence hidden left out: no time"]
    assert "A1: the nearest hidden state. A2: " in printed


def test_only_beside_noise_gradients_are_said_to_have_none() -> None:
    rows = [
        TableRow(defence, channel, "A", 1.0, 0.0, 0.0, 1.0)
        for defence in ("trusted-server", "some noise")
        for channel in ("hidden", "gradient")
    ]
    shown = [row[1] for row in cli_quickstart._cells(QuickTable(tuple(rows), ()))[1:]]
    assert shown == ["hidden (A)", "gradient (A)", "hidden (A)", "gradient, no noise (A)"]


def test_lines_about_a_part_say_how_long_it_takes_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter((100.0, 118.0, 138.0, 146.0))
    parts = Parts(silent=False, clock=lambda: next(now))
    for done in (1, 10, 20, 24):
        parts("federation", done, 24)
    assert capsys.readouterr().err.splitlines() == [
        "federation: 1 of 24, under way",
        "federation: 10 of 24, under way, 18 s, about 28 s left",
        "federation: 20 of 24, under way, 38 s, about 8 s left",
        "federation: 24 of 24, done, 46 s",
    ]


def test_waiting_for_a_parts_first_step_is_not_taken_for_its_pace(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter((100.0, 190.0, 200.0, 210.0))
    parts = Parts(silent=False, clock=lambda: next(now))
    for done in (0, 0, 4, 10):
        parts("federation", done, 20)
    assert capsys.readouterr().err.splitlines() == [
        "federation: 0 of 20, under way",
        "federation: 10 of 20, under way, 10 s, about 17 s left",
    ]


def test_one_step_behind_the_first_says_nothing_of_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter((100.0, 130.0, 131.0))
    parts = Parts(silent=False, clock=lambda: next(now))
    for done in (9, 10, 20):
        parts("federation", done, 40)
    assert capsys.readouterr().err.splitlines() == [
        "federation: 9 of 40, under way",
        "federation: 10 of 40, under way, 30 s",
        "federation: 20 of 40, under way, 31 s, about 56 s left",
    ]


def test_a_bar_says_what_is_left_as_soon_as_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(rich.console, "Console", partial(Console, file=out, force_terminal=True, width=80))
    now = iter((100.0, 110.0))
    with Parts(silent=False, clock=lambda: next(now)) as parts:
        parts("federation", 1, 24)
        parts._bars.refresh()
        assert "left" not in out.getvalue()
        parts("federation", 11, 24)
    assert "about 13 s left" in out.getvalue()


def test_a_terminal_of_eighty_columns_cuts_no_number_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        rich.console, "Console", partial(Console, file=out, force_terminal=True, width=80, color_system=None)
    )
    now = iter((0.0, 190.0, 190.0))
    with Parts(silent=False, clock=lambda: next(now)) as parts:
        parts("A1 nearest hidden state over the vocabulary", 1, 1416)
        parts("A1 nearest hidden state over the vocabulary", 208, 1416)
        parts("self-check", 1, 128)
    last = out.getvalue().split("\x1b[2K")[-1]
    for number in (" 208/1416 ", " 1/128 ", "0:00:00", "about 18 min 29 s left", "vocabulary"):
        assert number in last
