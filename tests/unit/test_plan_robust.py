"""A median or a trimmed mean that limits nothing is refused."""

from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.plan import FederationPlan, parse_plan, parse_plan_json
from fedsea.plan.robust import num_trimmed


def plan(count: int, method: str, fraction: float = 0.1, sync: str = "round", **sections: object) -> FederationPlan:
    aggregation = {"method": method, "trim_fraction": fraction, "sync": sync}
    clients = [{"name": f"c{i}"} for i in range(count)]
    return parse_plan({"model": {"path": "m"}, "aggregation": aggregation, "clients": clients, **sections})


@pytest.mark.parametrize(
    ("count", "method", "fraction", "words"),
    [
        (1, "median", 0.1, "fewer than 3 clients: set aggregation.method"),
        (2, "median", 0.1, "fewer than 3 clients"),
        (2, "trimmed_mean", 0.49, "fewer than 3 clients"),
        (3, "trimmed_mean", 0.1, "= 0.1 cuts off none of 3 clients: set it to 0.34 or more"),
        (9, "trimmed_mean", 0.1, "none of 9 clients: set it to 0.12 or more"),
        (10, "trimmed_mean", 0.0, "= 0 cuts off none of 10 clients: set it to 0.1 or more"),
    ],
)
def test_refused_with_what_would_do(count, method, fraction, words):
    with pytest.raises(ConfigError, match=words):
        plan(count, method, fraction)


def test_what_cuts_off_somebody_is_taken():
    plan(10, "trimmed_mean")
    plan(3, "median")
    plan(2, "mean")
    plan(2, "median", sync="personal")
    plan(2, "median", adapter={"input": "frozen", "output": "frozen"})


def test_the_fraction_that_is_advised_is_enough_and_cuts_off_one():
    for count in range(3, 65):
        with pytest.raises(ConfigError) as caught:
            plan(count, "trimmed_mean", 0.0)
        advised = float(str(caught.value).split("set it to ")[1].split()[0])
        assert num_trimmed(advised, count) == 1
        plan(count, "trimmed_mean", advised)


def test_a_client_of_such_a_plan_trains_alone_by_a_plan_that_can_be_read_again():
    alone = plan(3, "trimmed_mean", 0.34).alone("c1")
    assert parse_plan_json(alone.to_json()) == alone


def test_a_share_is_counted_exactly_and_somebody_always_stays():
    assert num_trimmed(0.29, 100) == 29  # 28.999999999999996 in floats
    assert [num_trimmed(0.4999999999999, count) for count in (1, 2, 3, 4)] == [0, 0, 1, 1]
