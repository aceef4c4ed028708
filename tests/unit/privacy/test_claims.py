"""What is claimed, what a release costs, and every reason for claiming nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fedsea.privacy.accountant import epsilon_of
from fedsea.privacy.claims import Claim, NoClaim, claim_of, report_of
from fedsea.privacy.pricing import Pricing
from fedsea.privacy.spent import Spent
from fedsea.types import Channel, Origin, Purpose
from tests.unit.privacy.plans import CLAIMED, FROZEN, noised

SEGMENT = {"clip_scope": "segment"}


def spent(total: float, **more: Any) -> Spent:
    made = Spent()
    made.take({"c": "hidden", "p": "training", "n": 1, "every": total, **more})
    return made


def claimed(plan: Any, total: float = 1.0) -> Claim | NoClaim:
    return claim_of(plan, "a", spent(total))


def test_a_claim_states_epsilon_delta_unit_and_what_is_not_covered():
    claim = claimed(noised())
    assert isinstance(claim, Claim)
    assert claim.epsilon == pytest.approx(epsilon_of(1.0, 1e-5))
    assert (claim.delta, claim.unit) == (1e-5, "sequence")
    for words in ("epsilon = 4.377", "delta = 1e-05", "one sequence", "lengths", "timings", "not covered as a whole"):
        assert words in claim.sentence()


def test_a_large_epsilon_is_no_claim():
    claim = claimed(noised(), 120.0)
    assert claim.sentence() == "no DP claim: epsilon = 105.9 is no protection"


def test_a_large_delta_is_no_claim():
    claim = claimed(noised({**CLAIMED, "delta": 0.5}))
    assert claim.sentence().startswith("no DP claim: noise.delta = 0.5 would let everything out that often")
    assert isinstance(claimed(noised({**CLAIMED, "delta": 1e-3})), Claim)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"trust": {"mode": "trusted-server"}, "noise": {}}, "trusted-server"),
        ({"noise": {"hidden_std": 1.0}}, "gradients leave without noise"),
        ({"noise": {**CLAIMED, "hidden_clip": 0.0}}, "no clip bounds the hidden states"),
        ({"noise": {**CLAIMED, "gradient_clip": 0.0}}, "no clip bounds the gradients"),
        ({"adapter": {**FROZEN, "output": "adapter"}, "optimizer": SEGMENT}, "updates leave without noise"),
        (
            {"adapter": {**FROZEN, "input": "adapter"}, "aggregation": {"sync": "personal"}},
            "norm of this client's gradients",
        ),
        (
            {
                "adapter": {**FROZEN, "output": "adapter"},
                "noise": {**CLAIMED, "update_std": 1.0},
                "optimizer": SEGMENT,
            },
            "no clip bounds the updates",
        ),
    ],
)
def test_reasons_for_claiming_nothing(sections, reason):
    claim = claimed(noised(**({"noise": CLAIMED} | sections)))
    assert isinstance(claim, NoClaim)
    assert reason in claim.sentence()
    assert claim.sentence().startswith("no DP claim: ")


def test_a_channel_that_is_closed_needs_no_noise():
    plan = noised(
        {"hidden_std": 4.0, "hidden_clip": 1.0},
        adapter={"input": "frozen", "trunk": "frozen", "output": "adapter"},
        aggregation={"sync": "personal"},
        optimizer=SEGMENT,
    )
    assert isinstance(claimed(plan), Claim)


def test_releases_that_left_without_a_bound_spoil_the_claim_for_good():
    made = spent(0.1)
    made.take({"c": "gradient", "p": "training", "n": 3, "unbounded": True})
    assert "3 releases on the gradient channel" in claim_of(noised(), "a", made).sentence()


def test_updates_are_accounted_for_the_client_apart_and_count_for_each_sequence_too():
    plan = noised(
        {**CLAIMED, "update_std": 8.0, "update_clip": 1.0},
        adapter={**FROZEN, "output": "adapter"},
        optimizer=SEGMENT,
    )
    price = Pricing(plan, "a", plan.noise).charge(Channel.UPDATE, None)
    assert price.every == pytest.approx(1 / 16)
    made = spent(1.0)
    made.take({"c": "update", "p": "training", "n": 1, "every": price.every})
    claim = claim_of(plan, "a", made)
    assert isinstance(claim, Claim)
    assert claim.update_epsilon == pytest.approx(epsilon_of(0.25, 1e-5))
    assert claim.epsilon == pytest.approx(epsilon_of((1 + 1 / 16) ** 0.5, 1e-5))
    assert "whole client" in claim.sentence()


# --- prices -----------------------------------------------------------------------------------------------------------

Q = (2 * 1.0 / 4.0) ** 2


def pricing(unit: str = "sequence", **sections: Any) -> Pricing:
    plan = noised({**CLAIMED, "unit": unit}, **sections)
    return Pricing(plan, "a", plan.noise)


def origin(**values: Any) -> Origin:
    return Origin(**{"purpose": Purpose.TRAINING, "lengths": (3, 2, 4)} | values)


PIECES = {"documents": ("d", "d", "e"), "pieces": (0, 1, 0)}


def test_each_sequence_pays_for_itself():
    charge = pricing().charge(Channel.HIDDEN, origin(**PIECES))
    assert charge.units == (("d.0", Q), ("d.1", Q), ("e.0", Q))
    assert (charge.every, charge.releases) == (0.0, 3)
    assert pricing().charge(Channel.GRADIENT, origin(**PIECES)).units[0] == ("d.0", Q / 4)


def test_a_document_pays_for_all_its_sequences():
    assert pricing("document").charge(Channel.HIDDEN, origin(**PIECES)).units == (("d", Q), ("d", Q), ("e", Q))


def test_sequences_that_nobody_knows_may_be_anyones():
    """And all of one and the same: a question with each of its answers, a prompt that is sampled from several times."""
    for unit in ("sequence", "document"):
        charge = pricing(unit).charge(Channel.HIDDEN, origin())
        assert (charge.every, charge.units) == (pytest.approx(3 * Q), ())


def test_the_token_that_two_pieces_of_a_document_share_pays_for_both():
    token = pricing("token", partition={"input_blocks": 0}, **CLOSED)
    made = Spent()
    units, new = made.numbered(token.charge(Channel.HIDDEN, origin(documents=("d",) * 3, pieces=(0, 1, 2))).units)
    made.take({"c": "hidden", "p": "training", "n": 3, "new": new, "units": units})
    assert made.total == pytest.approx(2 * Q)


def test_where_the_segment_is_trained_here_every_release_counts_for_everybody():
    trained = pricing(adapter={**FROZEN, "output": "full"}, aggregation={"sync": "personal"})
    assert trained.charge(Channel.GRADIENT, origin(**PIECES)).every == pytest.approx(3 * Q / 4)
    assert trained.charge(Channel.HIDDEN, origin(**PIECES)).every == 0.0
    below = pricing(adapter={**FROZEN, "input": "adapter"}, aggregation={"sync": "personal"})
    assert below.charge(Channel.HIDDEN, origin(**PIECES)).every == pytest.approx(3 * Q)


def test_a_session_pays_by_the_row_and_a_full_one_costs_a_sequence():
    session = pricing()
    parts = [Origin(Purpose.INFERENCE, (rows,), most_rows=8) for rows in (5, 1, 1, 1)]
    assert sum(session.charge(Channel.HIDDEN, part).every for part in parts) == pytest.approx(Q)
    beams = Origin(Purpose.INFERENCE, (5, 0, 3), most_rows=8)
    assert session.charge(Channel.HIDDEN, beams).every == pytest.approx(Q)


def test_a_token_is_paid_once_in_a_session_unless_rows_are_taken_back():
    token = pricing("token", partition={"input_blocks": 0}, **CLOSED)
    turns = [1, 0, 0, 1]
    parts = [Origin(Purpose.INFERENCE, (1,), most_rows=8, turns=count) for count in turns]
    assert sum(token.charge(Channel.HIDDEN, part).every for part in parts) == pytest.approx(2 * Q)


CLOSED: dict[str, Any] = {
    "adapter": {"input": "frozen", "trunk": "frozen", "output": "adapter"},
    "aggregation": {"sync": "personal"},
    "optimizer": SEGMENT,
}


def test_without_a_clip_the_cost_is_unknown():
    plan = noised({"hidden_std": 1.0})
    charge = Pricing(plan, "a", plan.noise).charge(Channel.HIDDEN, origin(**PIECES))
    assert not charge.bounded


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_what_is_left_of_the_budget():
    plan = noised({**CLAIMED, "epsilon": 10.0})
    report = report_of(plan, "a", spent(1.0))
    assert report["budget"] == 10.0
    assert report["left"] == pytest.approx(10.0 - epsilon_of(1.0, 1e-5))
    assert report["rows"] == [
        {
            "channel": "hidden",
            "purpose": "training",
            "releases": 1,
            "mu": 1.0,
            "epsilon": pytest.approx(epsilon_of(1.0, 1e-5)),
            "unit": "sequence",
        }
    ]
    assert report["claim"]["made"]


def test_the_report_of_the_papers_noise_counts_releases_and_claims_nothing():
    made = Spent()
    made.take({"c": "hidden", "p": "inference", "n": 7, "unbounded": True})
    report = report_of(noised({"hidden_std": 1.0}), "a", made)
    assert report["rows"][0]["releases"] == 7
    assert report["rows"][0]["mu"] is None
    assert report["mu"] is None
    assert not report["claim"]["made"]
    assert report["sentence"].startswith("no DP claim: ")
