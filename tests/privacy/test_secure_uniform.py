"""What the server holds of one client looks uniform, unless all others help it; and masks that are not fresh show.

Chi-square tests with fixed significance levels: by chance they fail once in a million runs.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedsea.federation.secure import Phase, Transcript, check_fresh
from fedsea.federation.secure.masks import add_streams, pair_stream_key, self_stream_key
from tests.support.secure import make_cast

ROUNDS = 60


def words_of(tensors):
    return np.concatenate([t.reshape(-1).numpy().view(np.uint64) for _, t in sorted(tensors.items())])


def chi_square_limit(cells, sigmas=5.0):
    """Far tail of chi-square by Wilson and Hilferty's approximation."""
    free = cells - 1
    return free * (1 - 2 / (9 * free) + sigmas * (2 / (9 * free)) ** 0.5) ** 3


def assert_uniform(words):
    """Every byte of the words, and the words over 64 equal intervals, have the frequencies of a uniform draw."""
    for byte in range(8):
        counts = np.bincount(((words >> np.uint64(8 * byte)) & np.uint64(255)).astype(np.int64), minlength=256)
        assert statistic(counts) < chi_square_limit(256), f"byte {byte}"
    assert statistic(np.bincount((words >> np.uint64(58)).astype(np.int64), minlength=64)) < chi_square_limit(64)


def statistic(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def view_of(cast, victim, helpers):
    """What is left of the victim's words when the server and these members take off all that they can compute.

    They know every pairwise mask of a helper, and enough helpers' shares give the victim's own mask.
    """
    member, layout = cast.members[victim], cast.setting.layout
    tensors = {name: tensor.clone() for name, tensor in cast.sent[victim].items()}
    total = layout.zeros()
    layout.add(total, victim, tensors)
    for index, vector in total.items():
        mine = self_stream_key(member._seed, member._digest, victim, index)
        keys = {
            name: pair_stream_key(
                cast.members[name]._mask_key, member._own.mask_key, member._digest, (victim, name), index
            )
            for name in helpers
        }
        add_streams(vector, [key for name, key in keys.items() if name < victim], [mine])
        add_streams(vector, [], [key for name, key in keys.items() if victim < name])
    return total


@pytest.fixture(scope="module")
def rounds():
    """The same values in every round: whatever differs is the masks."""
    casts = []
    for attempt in range(ROUNDS):
        cast = make_cast(5, attempt=attempt, seed=11)
        cast.play({"c4": Phase.MASKED})
        casts.append(cast)
    return casts


def test_what_the_server_receives_of_a_client_is_uniform(rounds):
    assert_uniform(np.concatenate([words_of(cast.sent["c1"]) for cast in rounds]))


def test_it_is_uniform_for_a_server_that_all_but_one_other_member_help(rounds):
    left = [view_of(cast, "c1", ["c0", "c3", "c4"]) for cast in rounds]  # c2 is honest
    assert_uniform(np.concatenate([vector for total in left for vector in total.values()]))


def test_it_is_laid_bare_for_a_server_that_all_other_members_help(rounds):
    cast = rounds[0]
    left = view_of(cast, "c1", ["c0", "c2", "c3", "c4"])
    numbers, layout = cast.setting.numbers, cast.setting.layout
    for index, vector in left.items():
        assert int(vector[-1]) == cast.weights["c1"]
        for name, shape, part in layout.groups[index].slices():
            found = numbers.decode(vector[part], cast.weights["c1"]).view(shape)
            torch.testing.assert_close(found, cast.values["c1"][name], rtol=2**-23, atol=2 * numbers.error)


def test_the_test_of_uniformity_sees_unmasked_values(rounds):
    """It would otherwise prove nothing."""
    cast = rounds[0]
    left = view_of(cast, "c1", ["c0", "c2", "c3", "c4"])
    with pytest.raises(AssertionError):
        assert_uniform(np.concatenate(list(left.values()) * ROUNDS))


def test_the_sum_of_two_rounds_is_all_that_two_rounds_tell(rounds):
    """Values are the same in both: with masks that were used again the difference would be zero."""
    assert_uniform(
        np.concatenate([words_of(a.sent["c1"]) - words_of(b.sent["c1"]) for a, b in itertools.pairwise(rounds)])
    )


# --- for the audit ----------------------------------------------------------------------------------------------------


def transcripts(cast):
    setting, keys = cast.setting, cast.aggregator.roster
    return [
        Transcript(name, setting.round, setting.attempt, keys.get(name), cast.sent.get(name, {})) for name in cast.names
    ]


def test_fresh_masks_give_no_finding(rounds):
    assert check_fresh([one for cast in rounds[:10] for one in transcripts(cast)]) == []


def test_a_mask_that_was_used_again_is_found():
    before, now = make_cast(3, attempt=1, seed=1), make_cast(3, attempt=2, seed=2)
    for name in before.names:  # a client that keeps its keys over attempts, as a faulty one might
        for secret in ("_mask_key", "_sharing_key", "_seed"):
            setattr(now.members[name], secret, getattr(before.members[name], secret))
    for cast in (before, now):
        cast.play(until=Phase.MASKED)
    for member in now.members.values():
        member._digest = next(iter(before.members.values()))._digest
    for cast in (before, now):
        for name, member in cast.members.items():
            member._shares = dict.fromkeys(cast.names, b"")
            cast.sent[name] = cast.setting.layout.to_tensors(member.mask(cast.values[name], cast.weights[name]))
    found = check_fresh([*transcripts(before), *transcripts(now)])
    assert {finding.kind for finding in found} == {"key reused", "mask reused"}
    assert {finding.clients for finding in found if finding.kind == "mask reused"} == {("c0",), ("c1",), ("c2",)}
    assert all("round 3, attempt 1" in finding.detail for finding in found)


def test_values_without_a_mask_are_found(monkeypatch):
    monkeypatch.setattr("fedsea.federation.secure.member.add_streams", lambda *_: None)
    cast = make_cast(3)
    cast.play(until=Phase.CONSENT)
    assert {finding.kind for finding in check_fresh(transcripts(cast))} == {"not masked"}
