"""The verdict over all attacks, those that did not run included, and what the report says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsea.audit.attacks.a7_update import UpdateReport
from fedsea.audit.attacks.a8_membership import MembershipReport
from fedsea.audit.attacks.a9_mechanism import MechanismReport
from fedsea.audit.attacks.update_scoring import UpdateInversion
from fedsea.audit.catalogue import ATTACKS
from fedsea.audit.outcome import AuditReport, Outcome, Status, enough, own, scored
from fedsea.audit.report import rows_of
from fedsea.audit.scoring import Rate, Score
from fedsea.audit.verdict import Verdict, of_score

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


def test_every_attack_that_ran_has_recovery_prior_and_excess_in_the_json() -> None:
    weak = UpdateInversion("gradient", 3, 1, 1, 40, 0.2, 0.5, 0.1, 0.0, "sparse", 0.29, 0.2)
    clear = UpdateInversion("gradient", 1, 1, 1, 40, 0.9, 1.0, 0.25, 1.0, "span", 0.95, 0.3)
    results = {
        "A7": UpdateReport((weak, clear), sets={"planted": UpdateReport((weak,)), "own texts": UpdateReport((clear,))}),
        "A8": MembershipReport(None, 0.0, "all", reason="too few"),
        "A9": MechanismReport(()),
    }
    found = {attack.id: own(attack, results[attack.id]) for attack in ATTACKS if attack.id in results}
    figures = {
        name: [outcome.to_json()[key] for key in ("recovery", "prior", "excess")] for name, outcome in found.items()
    }
    assert figures == {"A7": [0.9, 0.25, 0.65], "A8": [None] * 3, "A9": [None] * 3}
    assert rows_of(found["A7"])[0][2:5] == ["90.0 %", "25.0 %", "65.0 %"]
    assert rows_of(found["A8"])[0][2:5] == [""] * 3
    sets = found["A7"].to_json()["sets"]
    assert {name: one["excess"] for name, one in sets.items()} == {"planted": 0.1, "own texts": 0.65}
    apart = rows_of(found["A7"])[1:]
    assert [row[:3] for row in apart] == [["A7, planted", "update", "20.0 %"], ["A7, own texts", "update", "90.0 %"]]
    assert [row[-1] for row in apart] == ["", ""]


def _found(name: str, recovery: float, prior: float) -> Outcome:
    attack = next(attack for attack in ATTACKS if attack.id == name)
    rates = [Rate(value, value, value) for value in (recovery, prior, recovery - prior)]
    share = (recovery - prior) / (1 - prior)
    return Outcome(attack, "run", score=Score(*rates, Rate(share, share, share), 0.0, 0.0, {}, {}, 100, 4))


def test_a_recovery_that_the_prior_explains_does_not_end_the_search_for_more() -> None:
    """96 % where 94 % are guessed is PARTIAL; a better attack with 98 % would make it EXPOSED."""
    weak = _found("A1", 0.96, 0.94)
    assert weak.score is not None
    assert of_score(weak.score) is Verdict.PARTIAL
    assert enough([weak]) == ""


def test_what_is_read_nearly_whole_needs_no_further_attack() -> None:
    found = [_found("A0", 1.0, 0.5), _found("A1", 0.6, 0.5), _found("A2", 0.98, 0.5)]
    assert enough(found) == "a simpler attack recovered 98.0% already, 96.0% of what the prior leaves open"
    assert enough(found[:2]) == ""
    assert enough([]) == ""


def test_an_attack_that_was_cut_short_proves_nothing_and_what_it_found_counts() -> None:
    for recovery, verdict in ((0.5, Verdict.INCONCLUSIVE), (0.9, Verdict.EXPOSED)):
        found = _found("A5", recovery, 0.5)
        assert found.score is not None
        outcome = scored(found.attack, replace(found.score, cut_short=True), ())
        assert outcome.verdict is verdict
        report = AuditReport({}, "", "", 1.0, (outcome,), (), {}, {})
        assert report.sentences[-1] == "There was no time for all passes over a text in A5: give more --minutes."


def test_an_inverter_that_was_stopped_before_it_had_learned_proves_nothing() -> None:
    found = _found("A3", 0.5, 0.5)
    assert found.score is not None
    outcome = scored(found.attack, replace(found.score, cut_short=True), ())
    others = [Outcome(attack, "run", Verdict.NOT_RECOVERED) for attack in ATTACKS if attack.id not in ("A0", "A3")]
    report = AuditReport({}, "", "", 1.0, (*others, outcome), (), {}, {})
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.sentences[-1] == "There was no time for A3 to learn all that it can: give more --minutes."


def test_no_time_for_any_attack_is_inconclusive_and_said_so() -> None:
    outcomes = [Outcome(attack, "skipped", reason="the time was up") for attack in ATTACKS if not attack.always]
    report = AuditReport({}, "", "", None, tuple(outcomes), (), {}, {})
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.sentences[-1] == "There was no time for any attack: give more --minutes."
    some = replace(report, outcomes=(*outcomes, Outcome(ATTACKS[1], "run", Verdict.NOT_RECOVERED)))
    assert some.verdict is Verdict.INCONCLUSIVE
    assert some.sentences[-1] == "There was no time for all attacks: give more --minutes."
