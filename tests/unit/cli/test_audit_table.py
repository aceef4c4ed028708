"""The audit's table at a terminal: what ran, and in a line each why the others did not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedsea.audit.catalogue import ATTACKS
from fedsea.audit.outcome import Outcome
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
    assert in_table == ["A9"]
    assert "A9: words of its own" in shown
    assert f"A4, A3 not needed: {why}." in shown
    assert "A5 not applicable." in shown
    assert "The attacker has: public weights." in shown
    assert "5.25" in shown
    assert "Verdict: PARTIAL" in shown
