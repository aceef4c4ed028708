"""What of a plan is agreed on: its hash, and how differences are told."""

from __future__ import annotations

from fedsea.plan import FederationPlan, differences, parse_plan, parse_plan_json


def plan(seed: int = 0, **model: object) -> FederationPlan:
    return parse_plan({"seed": seed, "model": {"path": "m", **model}, "clients": [{"name": "a"}]})


RESOLVED = {"fingerprint": {"config": "00ff", "embedding": "11ee"}}


def test_a_model_that_was_moved_is_the_same_plan():
    here, there = plan(**RESOLVED), plan(path="/elsewhere/m", revision="v2", **RESOLVED)
    assert here.sha256() == there.sha256()
    assert differences(here, there) == []


def test_another_model_is_another_plan_wherever_it_is():
    here, there = plan(**RESOLVED), plan(fingerprint={"config": "00ff", "embedding": "22dd"})
    assert here.sha256() != there.sha256()
    assert differences(here, there) == ["model.fingerprint.embedding: 11ee here, 22dd there"]


def test_without_a_fingerprint_the_path_says_which_model_it_is():
    assert plan().sha256() != plan(path="n").sha256()


def test_the_path_travels_with_the_plan():
    there = plan(path="/models/m", **RESOLVED)
    again = parse_plan_json(there.to_json())
    assert again == there
    assert again.sha256() == there.sha256()


def test_every_other_value_is_agreed_on():
    assert plan(**RESOLVED).sha256() != plan(seed=1, **RESOLVED).sha256()
    assert differences(plan(**RESOLVED), plan(seed=1, **RESOLVED)) == ["seed: 0 here, 1 there"]
