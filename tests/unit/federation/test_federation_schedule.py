"""Where each step of a run belongs."""

from __future__ import annotations

import pytest

from fedsea.federation.schedule import place
from fedsea.plan import parse_plan

CLIENTS = [{"name": name} for name in ("x", "b", "y")]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("per_round", [1, 4])
def test_batched_rounds_have_all_clients_in_every_step(rounds, per_round):
    training = {"rounds": rounds, "steps_per_round": per_round}
    plan = parse_plan({"model": {"path": "m"}, "clients": CLIENTS, "training": training})
    places = [place(plan, step) for step in range(plan.num_steps)]
    assert len(places) == rounds * per_round
    assert all(p.members == ("x", "b", "y") for p in places)
    assert [p.round for p in places] == [step // per_round for step in range(rounds * per_round)]
    assert [p.step for p in places if p.ends_round] == [per_round * (r + 1) - 1 for r in range(rounds)]


def test_turns_follow_the_plans_order_and_make_up_a_round():
    training = {"mode": "sequential", "rounds": 2, "steps_per_round": 2}
    plan = parse_plan({"model": {"path": "m"}, "clients": CLIENTS, "training": training})
    places = [place(plan, step) for step in range(plan.num_steps)]
    assert [p.members for p in places] == 2 * [("x",), ("x",), ("b",), ("b",), ("y",), ("y",)]
    assert [p.round for p in places] == 6 * [0] + 6 * [1]
    assert [p.step for p in places if p.ends_round] == [5, 11]
