"""How long and how often a lost server is sought."""

from __future__ import annotations

import random

import pytest

from fedsea.client.retry import RetryPolicy


class Fixed(random.Random):
    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def random(self) -> float:
        return self._value


def test_pauses_double_up_to_the_longest():
    policy = RetryPolicy(retry_for_s=100, first_s=1.0, longest_s=4.0, random=Fixed(1.0))
    pauses = policy.pauses()
    assert [next(pauses) for _ in range(5)] == [1.0, 2.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("seed", range(5))
def test_pauses_end_with_the_time_and_keep_their_jitter(seed):
    policy = RetryPolicy(retry_for_s=30, first_s=0.2, longest_s=10.0, random=random.Random(seed))
    pauses = list(policy.pauses())
    assert sum(pauses) == pytest.approx(30)
    nominal = 0.2
    for pause in pauses[:-1]:
        assert nominal / 2 <= pause <= nominal
        nominal = min(2 * nominal, 10.0)


def test_two_clients_do_not_try_in_step():
    one, other = (list(RetryPolicy(random=random.Random(seed)).pauses()) for seed in (1, 2))
    assert one != other
