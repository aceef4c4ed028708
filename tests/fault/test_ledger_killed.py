"""SIGKILL at every call that a charge makes of the system: what was sent is never more than what is counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fedsea.privacy import ledger as ledger_module
from fedsea.privacy.book import FILE, Book
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.pricing import Charge
from fedsea.types import Channel, Purpose
from tests.fault.killer import Killer, Nursery
from tests.unit.privacy.plans import noised

PLAN = noised()
CHARGES = 2
MOST_CALLS = 400


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def charge(folder: Path, sent: Path, killer: Killer, anchors: bool) -> None:
    """Charge and send, until the process that does it is killed."""
    send, out = os.write, os.open(sent, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if anchors:
        ledger_module._ANCHOR_EVERY_S = 0.0
    killer.install()
    with Ledger(folder, PLAN, "a", "run") as ledger:
        for _ in range(CHARGES):
            ledger.charge(Charge(Channel.HIDDEN, Purpose.TRAINING, 1, (("x", 0.25),)))
            send(out, b"x")


def sizes(folder: Path, sent: Path) -> tuple[int, int]:
    """Releases that were sent, and releases that are counted; opening the ledger must work."""
    with Ledger(folder, PLAN, "a", "run"):
        pass
    counted = Book.open(folder).spent.account(Channel.HIDDEN, Purpose.TRAINING).releases
    return sent.stat().st_size if sent.exists() else 0, counted


def attempts() -> Iterator[int]:
    yield from range(1, MOST_CALLS)
    pytest.fail("the process never came to its end")


@pytest.mark.parametrize("when", ["before", "middle", "after"])
@pytest.mark.parametrize("anchors", [False, True])
def test_a_new_ledger_never_counts_less_than_was_sent(tmp_path, nursery, when, anchors):
    seen = set()
    for at in attempts():
        folder, sent = tmp_path / str(at), tmp_path / f"{at}.sent"
        killed = nursery(partial(charge, folder, sent, Killer(at, when), anchors))
        num_sent, counted = sizes(folder, sent)
        assert num_sent <= counted <= num_sent + 1
        seen.add((num_sent, counted))
        if not killed:
            break
    assert {(n, n) for n in range(CHARGES + 1)} <= seen
    assert {(n, n + 1) for n in range(CHARGES)} <= seen  # charged, and killed before it was sent


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_ledger_that_is_killed_again_and_again_never_counts_less_than_was_sent(tmp_path, nursery, when):
    folder, sent, kills = tmp_path / "ledger", tmp_path / "sent", 0
    for at in attempts():
        killed = nursery(partial(charge, folder, sent, Killer(at, when), bool(at % 2)))
        kills += killed
        num_sent, counted = sizes(folder, sent)
        assert num_sent <= counted <= num_sent + kills
        if not killed:
            break
    assert kills > 10


def test_the_ledger_after_a_torn_line_is_the_one_before_it(tmp_path):
    with Ledger(tmp_path, PLAN, "a", "run") as ledger:
        ledger.charge(Charge(Channel.HIDDEN, Purpose.TRAINING, 1, (("x", 0.25),)))
    before = (tmp_path / FILE).read_bytes()
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"c":"hidden","p":"trai')
    with Ledger(tmp_path, PLAN, "a", "run"):
        pass
    assert (tmp_path / FILE).read_bytes() == before
