"""Plans with secure aggregation: what is refused when they are loaded, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from fedsea.errors import ConfigError
from fedsea.plan import ClientLimits, FederationPlan, parse_plan


def plan(count: int = 4, cuts: dict[int, dict[str, int]] | None = None, **sections: Any) -> FederationPlan:
    aggregation = {"secure": True, **sections.pop("aggregation", {})}
    clients = [{"name": f"c{index}", **(cuts or {}).get(index, {})} for index in range(count)]
    return parse_plan({"model": {"path": "m"}, "clients": clients, "aggregation": aggregation, **sections})


@pytest.mark.parametrize(("count", "threshold"), [(2, 2), (3, 3), (4, 3), (10, 7), (50, 34)])
def test_the_default_threshold_is_the_smallest_two_thirds_majority(count, threshold):
    assert plan(count).secure_threshold == threshold
    assert 3 * threshold > 2 * count >= 3 * (threshold - 1)


def test_a_threshold_of_a_majority_is_taken():
    assert plan(10, aggregation={"secure_threshold": 6}).secure_threshold == 6


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregation": {"method": "median"}}, 'method = "mean"'),
        ({"aggregation": {"sync": "step"}}, 'sync = "round"'),
        ({"aggregation": {"sync": "personal"}}, 'sync = "round"'),
        ({"aggregation": {"secure_threshold": 2}}, "majority of the 4 clients: 3 to 4"),
        ({"aggregation": {"secure_threshold": 5}}, "majority of the 4 clients: 3 to 4"),
        ({"aggregation": {"secure_min": 5}}, "secure_min"),
        ({"count": 1}, "2 .* to 64 clients, and the plan has 1"),
        ({"count": 65}, "64 clients"),
        ({"adapter": {"input": "frozen", "output": "frozen"}}, "nothing to sum"),
        ({"cuts": {1: {"input_blocks": 3}}}, "only 1 of the clients have input_blocks above 1"),
        ({"cuts": {0: {"output_blocks": 2}, 1: {"output_blocks": 2}}, "aggregation": {"secure_min": 3}}, "only 2"),
    ],
)
def test_a_plan_whose_sums_cannot_be_made_or_would_show_too_much_is_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        plan(**sections)


def test_clients_may_have_other_cuts_if_enough_share_each():
    plan(cuts={0: {"input_blocks": 3}, 2: {"input_blocks": 3}})


def test_without_secure_aggregation_its_keys_do_not_matter():
    plan(1, aggregation={"secure": False, "secure_threshold": 40})


def test_a_client_may_insist_on_secure_aggregation():
    limits = ClientLimits(secure_aggregation=True)
    limits.check(plan(), "c0")
    limits.check(plan(aggregation={"secure": False, "sync": "personal"}), "c0")
    for aggregation in ({"secure": False}, {"secure": False, "sync": "step"}):
        with pytest.raises(ConfigError, match=r"aggregation\.secure = false"):
            limits.check(plan(aggregation=aggregation), "c0")


def test_the_most_tokens_of_a_round_are_those_of_the_largest_client():
    training = {"steps_per_round": 10, "micro_batches": 2, "micro_batch_sequences": 4}
    found = plan(cuts={3: {"micro_batches": 3}}, training=training, data={"max_tokens": 100})
    assert found.most_round_tokens == 10 * 3 * 4 * 100
