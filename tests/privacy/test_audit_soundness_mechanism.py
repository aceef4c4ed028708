"""Soundness of attack A9: under the claim for the right mechanism, over it for a planted fault."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedsea.audit.attacks import a9_mechanism
from fedsea.audit.attacks.a9_mechanism import hold_against_claim, mechanism_of
from fedsea.audit.attacks.intervals import clopper_pearson
from fedsea.audit.verdict import Verdict
from fedsea.errors import ConfigError
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel
from tests.support.attacked import attacker_of, noised, plan_of

KEY = bytes(range(32))
CLIP, STD = 2.0, 4.0
"""mu = 2 C / sigma = 1."""


def claimed(folder: Path, unit: str = "sequence", k: int = 1) -> FederationPlan:
    both = {"hidden_std": STD, "hidden_clip": CLIP, "gradient_std": STD, "gradient_clip": CLIP}
    closed = {"adapter": {"input": "frozen", "trunk": "frozen"}} if unit == "token" else {}
    return plan_of(folder, k, 1, **noised(unit=unit, **both), **closed)


def boundary(folder: Path, unit: str = "sequence", k: int = 1, **noise: float) -> Boundary:
    both = {"hidden_std": STD, "hidden_clip": CLIP, "gradient_std": STD, "gradient_clip": CLIP}
    return Boundary.of(plan_of(folder, k, 1, **noised(unit=unit, **(both | noise))), key=KEY)


@pytest.mark.parametrize("channel", [Channel.HIDDEN, Channel.GRADIENT])
def test_the_real_boundary_stays_under_its_claim_and_near_it(base_model: Path, channel: Channel) -> None:
    mechanism = mechanism_of(boundary(base_model), channel)
    test = hold_against_claim(claimed(base_model), channel, mechanism, 20_000)
    assert test.holds
    assert test.claimed_mu == pytest.approx(1.0)
    assert 0.9 < test.bound.mu <= 1.0  # near: a test that finds nothing would prove nothing
    assert 1.5 < test.bound.epsilon < test.claimed_epsilon


def test_sensitivity_taken_as_c_instead_of_2c_is_refuted(base_model: Path) -> None:
    """Whoever thinks that replacing a record moves a clipped sum by C calibrates half of the noise."""
    mechanism = mechanism_of(boundary(base_model, hidden_std=STD / 2), Channel.HIDDEN)
    test = hold_against_claim(claimed(base_model), Channel.HIDDEN, mechanism, 60_000)
    assert not test.holds
    assert test.bound.epsilon > test.claimed_epsilon
    assert test.bound.mu > 1.8


def test_a_clip_left_out_is_refuted(base_model: Path) -> None:
    mechanism = mechanism_of(boundary(base_model, hidden_clip=0.0), Channel.HIDDEN)
    test = hold_against_claim(claimed(base_model), Channel.HIDDEN, mechanism, 20_000)
    assert test.bound.epsilon > test.claimed_epsilon


def test_rows_clipped_each_by_itself_do_not_bound_a_sequence(base_model: Path) -> None:
    token = Boundary.of(plan_of(base_model, 0, 1, **noised(unit="token", hidden_std=STD, hidden_clip=CLIP),
                                adapter={"input": "frozen", "trunk": "frozen"}), key=KEY)  # fmt: skip
    test = hold_against_claim(claimed(base_model), Channel.HIDDEN, mechanism_of(token, Channel.HIDDEN), 20_000)
    assert not test.holds


def test_the_attack_tests_every_channel_that_makes_a_claim(base_model: Path) -> None:
    attacker = attacker_of(claimed(base_model))
    report = a9_mechanism.run(attacker, [])
    assert [test.channel for test in report.tests] == [Channel.HIDDEN, Channel.GRADIENT]
    assert report.verdict is Verdict.NOT_RECOVERED
    faulty = a9_mechanism.run(attacker, [], boundary=boundary(base_model, gradient_clip=0.0))
    assert [test.holds for test in faulty.tests] == [True, False]
    assert faulty.verdict is Verdict.EXPOSED
    assert "OVER" in faulty.sentence


def test_updates_that_are_clipped_and_noised_are_tested_too(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a9_mechanism, "_UPDATE_TRIALS", 800)
    noise = {"hidden_std": 1.0, "gradient_std": 1.0, "update_std": STD, "update_clip": CLIP}
    plan = plan_of(base_model, 1, 1, **noised(**noise))
    (test,) = a9_mechanism.run(attacker_of(plan), []).tests
    assert (test.channel, test.holds) == (Channel.UPDATE, True)
    assert 0.5 < test.bound.mu <= test.claimed_mu == pytest.approx(1.0)
    for fault in ({"update_clip": 0.0}, {"update_std": STD / 2}):
        planted = Boundary.of(plan_of(base_model, 1, 1, **noised(**(noise | fault))), key=KEY)
        test = hold_against_claim(plan, Channel.UPDATE, mechanism_of(planted, Channel.UPDATE), 800)
        assert not test.holds, fault


def test_without_a_clip_there_is_no_claim_to_test(base_model: Path) -> None:
    plan = plan_of(base_model, 1, 1, **noised(hidden_std=1.0, gradient_std=1.0))
    report = a9_mechanism.run(attacker_of(plan), [])
    assert report.tests == ()
    assert "no claim" in report.sentence


def test_clopper_pearson_agrees_with_published_values_and_covers() -> None:
    for count, trials, low, high in ((0, 10, 0.0, 0.3085), (1, 20, 0.0013, 0.2487), (50, 100, 0.3983, 0.6017)):
        found = clopper_pearson(count, trials)
        assert found == pytest.approx((low, high), abs=1e-4)
    # The ends are where the tails are 2.5 %, summed term by term.
    low, high = clopper_pearson(7, 30)
    tail = sum(math.comb(30, i) * high**i * (1 - high) ** (30 - i) for i in range(8))
    head = sum(math.comb(30, i) * low**i * (1 - low) ** (30 - i) for i in range(7, 31))
    assert (tail, head) == pytest.approx((0.025, 0.025))
    with pytest.raises(ConfigError, match="no outcome"):
        clopper_pearson(3, 2)
