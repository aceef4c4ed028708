"""The number of drafts follows what trips cost and what is accepted."""

from __future__ import annotations

import random

import pytest

from fedsea.client.pace import Pace


def _run(pace, trip, acceptance, draft_s=0.0, trips=120, seed=0):
    """Trips of simulated length; the drafts of the last third."""
    chance = random.Random(seed)
    chosen = []
    for _ in range(trips):
        drafts = pace.choose()
        pace.drafted(drafts, drafts * draft_s)
        accepted = next((n for n in range(drafts) if chance.random() >= acceptance), drafts)
        pace.tripped(drafts + 1, trip(drafts + 1) * chance.uniform(0.9, 1.1))
        pace.verified(drafts, accepted)
        chosen.append(drafts)
    last = chosen[-trips // 3 :]
    return sum(last) / len(last)


def _best(trip, acceptance, draft_s=0.0, most=15):
    """What is best if all is known."""

    def rate(drafts):
        tokens = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
        return tokens / (trip(drafts + 1) + drafts * draft_s)

    return max(range(most + 1), key=rate), rate


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("base", "slope"), [(0.1, 0.0005), (0.02, 0.002), (0.004, 0.004)])
def test_the_rate_is_close_to_the_best_one(base, slope, acceptance):
    def trip(rows):
        return base + slope * rows

    drafts = _run(Pace(15), trip, acceptance)
    best, rate = _best(trip, acceptance)
    assert rate(drafts) >= 0.85 * rate(best)


def test_a_longer_way_makes_for_more_drafts():
    near = _run(Pace(15), lambda rows: 0.004 + 0.003 * rows, 0.7)
    far = _run(Pace(15), lambda rows: 0.1 + 0.003 * rows, 0.7)
    assert far > near + 3


def test_dear_drafts_are_fewer():
    cheap = _run(Pace(15), lambda rows: 0.05 + 0.001 * rows, 0.8, draft_s=0.0001)
    dear = _run(Pace(15), lambda rows: 0.05 + 0.001 * rows, 0.8, draft_s=0.02)
    assert dear < cheap - 3


def test_wrong_drafts_end_and_right_ones_come_back():
    pace = Pace(15)

    def trip(rows):
        return 0.01 + 0.003 * rows

    assert _run(pace, trip, 0.0) < 1
    assert _run(pace, trip, 0.95) > 4


def test_a_busy_server_gets_fewer_drafts():
    pace = Pace(15)
    idle = _run(pace, lambda rows: 0.03 + 0.0002 * rows, 0.8)
    busy = _run(pace, lambda rows: 0.03 + 0.02 * rows, 0.8)
    assert busy < idle - 3


def test_one_pause_changes_little():
    pace = Pace(15)
    _run(pace, lambda rows: 0.02 + 0.002 * rows, 0.7)
    before = pace.choose()
    pace.tripped(before + 1, 30.0)
    assert abs(pace.choose() - before) <= 2


def test_without_drafts_there_is_nothing_to_choose():
    pace = Pace(0)
    assert pace.choose() == 0
    pace.tripped(1, 0.1)
    pace.verified(0, 0)
    assert pace.choose() == 0
