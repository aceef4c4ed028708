"""Settings that cannot work are refused, and say what can."""

from __future__ import annotations

import pytest

from fedsea.client.generation import GenerationSettings, GenerationStats
from fedsea.errors import ConfigError

WRONG = [
    ("max_new_tokens", 0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", 1e-30),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-300),
    ("repetition_penalty", 100.5),
    ("repetition_penalty", float("nan")),
    ("repetition_penalty", float("inf")),
    ("seed", 2**64),
    ("num_logprobs", -2),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        GenerationSettings(**{name: value})


def test_speed_counts_tokens_after_the_first():
    stats = GenerationStats(3, new_tokens=11, first_token_s=2.0, seconds=4.0)
    assert stats.tokens_per_s == 5.0
    assert GenerationStats(3).tokens_per_s == 0.0
