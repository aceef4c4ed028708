"""Look-up drafts what followed the longest run of last tokens, at constant work for each token."""

from __future__ import annotations

import random

import pytest

from fedsea.client.drafters import PromptLookup
from fedsea.errors import ConfigError
from fedsea.model.sampling import Sampler, Sampling

SAMPLER = Sampler(Sampling())


def _draft(tokens, most=4, max_ngram=3):
    return list(PromptLookup(max_ngram).begin(100, 50).draft(tokens, most, SAMPLER).tokens)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),
        ([1, 2, 9, 8, 3, 2, 7, 7, 1, 2], [9, 8, 3, 2]),  # two tokens go before one
        ([5, 1, 5, 2, 5], [2, 5, 2, 5]),  # the later occurrence; the copy goes on with itself
        ([7, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_what_followed_before_is_drafted(tokens, expected):
    assert _draft(tokens) == expected


def test_an_index_that_grows_finds_what_a_new_one_finds():
    chance = random.Random(0)
    text = [chance.randrange(6) for _ in range(5)]
    growing = PromptLookup().begin(1000, 6)
    for _ in range(200):
        assert list(growing.draft(text, 5, SAMPLER).tokens) == _draft(text, 5)
        text += [chance.randrange(6) for _ in range(chance.randrange(1, 4))]


def test_each_token_is_indexed_once():
    class Counted(list):
        reads = 0

        def __getitem__(self, key):
            Counted.reads += 1
            return super().__getitem__(key)

    lookup, text = PromptLookup().begin(10_000, 6), Counted([1, 2, 3] * 1000)
    lookup.draft(text, 4, SAMPLER)
    Counted.reads = 0
    text.append(1)
    lookup.draft(text, 4, SAMPLER)
    assert Counted.reads <= 16


def test_texts_do_not_share_an_index():
    drafter = PromptLookup()
    drafter.begin(10, 9).draft([1, 2, 3, 1], 2, SAMPLER)
    assert list(drafter.begin(10, 9).draft([5, 1], 2, SAMPLER).tokens) == []


def test_a_look_up_of_nothing_is_refused():
    with pytest.raises(ConfigError):
        PromptLookup(max_ngram=0)
