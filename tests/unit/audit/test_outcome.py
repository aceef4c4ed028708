"""The verdict over all attacks, those that did not run included, and what the report says of them."""

from __future__ import annotations

import pytest

from fedsea.audit.catalogue import ATTACKS
from fedsea.audit.outcome import AuditReport, Outcome, Status
from fedsea.audit.verdict import Verdict

Rest = dict[str, Status]


def _report(found: Verdict, rest: Rest) -> AuditReport:
    """Of attacks that all ran and found this, but for the rest."""
    outcomes = [
        Outcome(attack, rest[attack.id]) if attack.id in rest else Outcome(attack, "run", found) for attack in ATTACKS
    ]
    return AuditReport({}, "", "", 1.0, tuple(outcomes), (), {}, {})


def test_attacks_that_were_not_asked_for_make_no_clean_verdict() -> None:
    report = _report(Verdict.NOT_RECOVERED, {"A4": "not asked for", "A9": "not asked for"})
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.sentences[-1] == "Not run: A9 (not asked for); A4 (not asked for)."


@pytest.mark.parametrize("found", [Verdict.PARTIAL, Verdict.EXPOSED, Verdict.BROKEN])
def test_what_was_found_stays_found_whatever_else_was_not_asked_for(found: Verdict) -> None:
    report = _report(found, {"A4": "not asked for"})
    assert report.verdict is found
    assert "A4 (not asked for)" in report.sentences[-1]


def test_attacks_that_had_no_reason_to_run_leave_the_verdict() -> None:
    report = _report(Verdict.NOT_RECOVERED, {"A4": "not needed", "A5": "not applicable"})
    assert report.verdict is Verdict.NOT_RECOVERED
