"""The audit's table at a terminal: what ran, and in a line each why the others did not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedsea.audit.catalogue import ATTACKS
from fedsea.audit.outcome import Outcome
from fedsea.audit.scoring import Rate, Score
from fedsea.audit.verdict import Verdict
from fedsea.cli import audit


def test_the_table_has_what_ran_and_the_others_are_said_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    why = "a simpler attack recovered 98.0% already"
    status = {"A9": "run", "A3": "not needed", "A4": "not needed", "A5": "not applicable", "A7": "skipped"}
    outcomes = [
        Outcome(
            attack,
            status.get(attack.id, "not asked for"),
            Verdict.NOT_RECOVERED if attack.id == "A9" else None,
            reason=why if status.get(attack.id) == "not needed" else "words of its own" * (attack.id == "A9"),
        )
        for attack in ATTACKS
    ]
    by_set = {"planted": {"recovery": 0.25}, "own texts": {"recovery": 0.75}}
    outcomes.append(Outcome(outcomes[0].attack, "run", Verdict.PARTIAL, own={"recovery": 0.5, "sets": by_set}))
    perplexity = {"without_defence": 4.5, "with_defence": 5.25, "client_alone": 121.0}
    said = {
        "about": {"audited": "segments", "attacker_model": "public weights"},
        "statement": "Trust.",
        "claim": "no DP claim: none",
        "verdict": Verdict.PARTIAL,
        "sentences": ["Why."],
    }
    audit._show(SimpleNamespace(outcomes=outcomes, perplexity=perplexity, **said))
    shown = capsys.readouterr().out
    in_table = [attack.id for attack in ATTACKS if f"│ {attack.id}" in shown]
    assert in_table == ["A0", "A9"]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    rows = [row for row in cells if row[0].startswith(("A0", "planted", "own"))]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("A0 hidden", "50.0", "PARTIAL"),
        ("planted", "25.0", ""),
        ("own texts", "75.0", ""),
    ]
    assert "A9: words of its own" in shown
    assert f"A4, A3 not needed: {why}." in shown
    assert "A5 not applicable." in shown
    assert "The attacker has: public weights." in shown
    assert "5.25" in shown
    assert "Verdict: PARTIAL" in shown


def _score(identifiers: dict[str, float]) -> Score:
    rate = Rate(-0.125, -0.25, -0.0625)
    whole = Rate(1.0, 1.0, 1.0)
    return Score(whole, rate, rate, whole, 1.0, 1.0, identifiers, dict.fromkeys(identifiers, 8), 400, 8)


def test_at_80_columns_nothing_is_cut_and_an_attack_takes_three_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    named = _score(dict.fromkeys(("id", "mail", "name", "phone"), 1.0))
    outcomes = [
        Outcome(attack, "run", Verdict.NOT_RECOVERED, score=named, sets={"planted": named, "own texts": _score({})})
        for attack in ATTACKS
    ]
    perplexity = {"without_defence": 4.5, "with_defence": 5.25, "client_alone": 121.0}
    said = {"about": {"audited": "", "attacker_model": ""}, "statement": "", "claim": "", "sentences": []}
    audit._show(SimpleNamespace(outcomes=outcomes, perplexity=perplexity, verdict=Verdict.PARTIAL, **said))
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("└"))]
    assert max(map(len, table)) <= 80
    shown = "\n".join(table)
    assert all(heading in shown for heading in ("identifiers", "excess", "recovered", "verdict"))
    first = next(i for i, line in enumerate(table) if "A1 hidden" in line)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table[first : first + 7]]
    assert [row[0] for row in cells] == ["A1 hidden", "", "", "planted", "", "", "own texts"]
    assert [row[4] for row in cells[:3]] == ["id 100, mail 100,", "name 100,", "phone 100"]
    assert [row[5] for row in cells[3:]] == [""] * 4  # the verdict is that of both
    assert " ".join(row[5] for row in cells[:3]) == Verdict.NOT_RECOVERED.value
    assert cells[0][1:4] == ["100.0", "-12.5", "-12.5"]
