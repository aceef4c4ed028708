"""The parts of secure aggregation: fixed-point numbers, shares of secrets, masks, groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import AggregationError, ConfigError, ProtocolError
from fedsea.federation.secure import FixedPoint, Layout, shamir
from fedsea.federation.secure.fixed_point import LARGEST
from fedsea.federation.secure.masks import (
    add_streams,
    derive,
    exchange,
    open_shares,
    pair_stream_key,
    seal_shares,
    self_stream_key,
)
from fedsea.federation.secure.member import public_bytes

# --- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 20), st.sampled_from([1, 700, 2**20, 2**28]))
def test_a_mean_errs_by_no_more_than_is_stated(seed, count, most_weight):
    generator = torch.Generator().manual_seed(seed)
    numbers = FixedPoint.of(count, most_weight)
    values = [LARGEST * (2 * torch.rand(50, generator=generator) - 1) for _ in range(count)]
    weights = [int(torch.randint(1, most_weight + 1, (), generator=generator)) for _ in range(count)]
    words = sum(numbers.encode(value, weight, "p") for value, weight in zip(values, weights, strict=True))
    exact = sum(v.double() * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    found = numbers.decode(words, sum(weights))
    rounding = exact.abs() * 2.0**-24
    assert bool(((found.double() - exact).abs() <= numbers.error + rounding).all())


def test_no_sum_overflows_at_the_ends_of_the_range():
    numbers = FixedPoint.of(50, 2**30)
    for sign in (1.0, -1.0):
        words = numbers.encode(torch.full((3,), sign * LARGEST), 2**30, "p")
        assert numbers.decode(words * np.uint64(50), 50 * 2**30).tolist() == [sign * LARGEST] * 3


@pytest.mark.parametrize("value", [LARGEST * 1.001, -2 * LARGEST, math.inf, math.nan])
def test_a_value_outside_the_range_is_refused_without_being_told(value):
    with pytest.raises(AggregationError, match=r"A value of block\.A is beyond 1024") as raised:
        FixedPoint.of(3, 10).encode(torch.tensor([1.0, value]), 5, "block.A")
    assert "nothing was sent" in raised.value.message


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_outside_the_range_is_refused(weight):
    with pytest.raises(AggregationError, match="weight"):
        FixedPoint.of(3, 10).encode(torch.ones(1), weight, "p")


def test_a_round_too_long_for_any_precision_is_refused():
    with pytest.raises(ConfigError, match="steps_per_round"):
        FixedPoint.of(50, 2**40)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_the_field_is_a_prime_field_above_the_secrets():
    assert shamir.PRIME > 2**256
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (2, 3), (3, 5), (34, 50)])
def test_any_threshold_of_shares_gives_the_secret_back(threshold, count):
    secret = bytes(range(224, 256))
    shares = shamir.split(secret, threshold, count)
    for chosen in itertools.islice(itertools.combinations(range(count), threshold), 20):
        assert shamir.combine({index + 1: shares[index] for index in chosen}) == secret


def test_one_share_too_few_fits_every_secret():
    """With t - 1 shares, each value of one more share is possible, and each gives another secret."""
    first, second, third = shamir.split(bytes(32), 3, 3)
    secrets_found = set()
    for guess in range(20):
        other = ((int.from_bytes(third, "big") + guess) % shamir.PRIME).to_bytes(33, "big")
        try:
            secrets_found.add(shamir.combine({1: first, 2: second, 3: other}))
        except ProtocolError:
            secrets_found.add(bytes([guess]))  # just above 2^256: as good as another secret
    assert len(secrets_found) == 20


def test_shares_of_the_same_secret_are_fresh_each_time():
    assert shamir.split(bytes(32), 2, 2) != shamir.split(bytes(32), 2, 2)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), b"\xff" * 33])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ProtocolError, match="wrong size"):
        shamir.combine({1: share, 2: bytes(33)})


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_added_and_subtracted_leaves_the_words():
    words = np.arange(100_001, dtype=np.uint64)
    keys = [bytes([index]) * 32 for index in range(3)]
    masked = words.copy()
    add_streams(masked, keys[:2], keys[2:])
    assert not np.array_equal(masked, words)
    add_streams(masked, keys[2:], keys[:2])
    assert np.array_equal(masked, words)


def test_pieces_of_a_long_vector_continue_the_stream():
    """The same key gives the same words wherever the pieces of the loop end, and no word twice."""
    short, long = np.zeros(40_000, dtype=np.uint64), np.zeros(100_000, dtype=np.uint64)
    add_streams(short, [b"k" * 32])
    add_streams(long, [b"k" * 32])
    assert np.array_equal(long[:40_000], short)
    assert len(np.unique(long)) == 100_000


def test_both_ends_of_a_pair_have_the_same_key_and_nobody_else():
    one, other, third = (X25519PrivateKey.generate() for _ in range(3))
    digest = b"d" * 32
    key = pair_stream_key(one, public_bytes(other), digest, ("a", "b"), 0)
    assert key == pair_stream_key(other, public_bytes(one), digest, ("b", "a"), 0)
    others = [
        pair_stream_key(third, public_bytes(other), digest, ("a", "b"), 0),
        pair_stream_key(one, public_bytes(other), b"e" * 32, ("a", "b"), 0),
        pair_stream_key(one, public_bytes(other), digest, ("a", "c"), 0),
        pair_stream_key(one, public_bytes(other), digest, ("a", "b"), 1),
        self_stream_key(exchange(one, public_bytes(other)), digest, "a", 0),
        derive(exchange(one, public_bytes(other)), digest, "shares", "a", "b"),
    ]
    assert len({key, *others}) == 7


@pytest.mark.parametrize("key", [bytes(32), (1).to_bytes(32, "little")])
def test_a_key_that_makes_every_secret_the_same_is_refused(key):
    with pytest.raises(ProtocolError, match="guessed"):
        exchange(X25519PrivateKey.generate(), key)


def test_sealed_shares_open_only_as_they_were_meant():
    one, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    digest, way = b"d" * 32, ("a", "b")
    sealed = seal_shares(one, public_bytes(other), digest, way, b"s" * 66)
    assert open_shares(other, public_bytes(one), digest, way, sealed) == b"s" * 66
    altered = bytes([sealed[0] ^ 1]) + sealed[1:]
    wrong = [
        (digest, ("b", "a"), sealed),
        (digest, ("a", "c"), sealed),
        (b"e" * 32, way, sealed),
        (digest, way, altered),
    ]
    for where, path, data in wrong:
        with pytest.raises(ProtocolError, match="do not open"):
            open_shares(other, public_bytes(one), where, path, data)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_parameters_are_grouped_by_who_holds_them():
    layout = Layout.of({"a": {"x": (2,), "y": (3,)}, "b": {"y": (3,), "z": (1, 4)}, "c": {"y": (3,), "z": (1, 4)}})
    assert [(group.holders, tuple(group.shapes)) for group in layout.groups] == [
        (("a",), ("x",)),
        (("a", "b", "c"), ("y",)),
        (("b", "c"), ("z",)),
    ]
    assert layout.of_client("b") == (1, 2)
    assert layout.shapes_of("b") == {"y": (3,), "z": (1, 4), "weights": (2,)}
    small = layout.too_small(("b", "c"), 2)
    assert small is None
    small = layout.too_small(("a", "b", "c"), 2)
    assert small is not None
    assert small.holders == ("a",)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "more"])
def test_masked_tensors_that_are_not_a_client_s_are_refused(change):
    layout = Layout.of({"a": {"x": (2,)}, "b": {"x": (2,)}})
    tensors = {"x": torch.zeros(2, dtype=torch.int64), "weights": torch.zeros(1, dtype=torch.int64)}
    if change == "missing":
        del tensors["weights"]
    elif change == "shape":
        tensors["x"] = torch.zeros(3, dtype=torch.int64)
    elif change == "dtype":
        tensors["x"] = torch.zeros(2)
    else:
        tensors["y"] = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ProtocolError, match="all of its 2 masked tensors"):
        layout.check("a", tensors)
