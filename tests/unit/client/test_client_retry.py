"""How long and how often a lost server is sought."""

from __future__ import annotations

import math
import random

import pytest

from fedsea.client.retry import RetryPolicy
from fedsea.errors import AuthError, TransportError


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


def said(caplog, reasons, retry_for_s=2000.0):
    """What is said of an outage in which a try fails for each of these reasons, ten seconds apart."""
    now = [0.0]
    tries = RetryPolicy(retry_for_s, first_s=10.0, random=Fixed(1.0)).tries(lambda: now[0])
    caplog.clear()
    for reason in reasons:
        now[0] += tries.pause_after(TransportError(reason))
    return caplog.messages


def test_a_reason_is_said_once_and_then_at_growing_intervals(caplog):
    assert said(caplog, ["Nothing listens."] * 30) == [
        "Nothing listens. Trying again, for 33 min 20 s at most.",
        "Nothing listens. Trying again, for 32 min 50 s at most.",
        "Nothing listens. Trying again, for 31 min 50 s at most.",
        "Nothing listens. Trying again, for 29 min 50 s at most.",
    ]


def test_another_reason_is_said_at_once(caplog):
    assert said(caplog, ["One.", "One.", "Two.", "Two.", "One."], math.inf) == [
        f"{reason}. Trying again." for reason in ("One", "Two", "One")
    ]


def test_nothing_is_tried_again_that_cannot_help_nor_said_of_it(caplog):
    assert RetryPolicy().tries().pause_after(AuthError("Expired.")) is None
    assert RetryPolicy(0.0).tries().pause_after(TransportError("Away.")) is None
    assert not caplog.messages
