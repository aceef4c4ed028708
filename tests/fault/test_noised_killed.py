"""Noise once, send many: what a server or client that is killed in the middle of a step makes the ledger count."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedsea.client import accounts
from fedsea.privacy.book import Book
from fedsea.types import Channel, Purpose
from tests.support.federation import Federation
from tests.support.processes import Fault

STEPS = "fedsea.server.steps:StepRunner"
NOISED: dict[str, Any] = {
    "trust": {"mode": "noised"},
    "noise": {"hidden_std": 40.0, "gradient_std": 40.0, "hidden_clip": 1.0, "gradient_clip": 1.0},
    "adapter": {"input": "frozen", "output": "frozen"},
}
ONCE = 6 * 2
"""Sequences of all steps."""

_seeds = itertools.count(1000)


def noised(federation: Any) -> Federation:
    """A federation of one; another plan each time, so that its ledger is its own."""
    made: Federation = federation("a", seed=next(_seeds), **NOISED)
    return made


def releases(fed: Federation) -> tuple[int, int]:
    (folder,) = accounts.find_ledgers(fed.folder / "a")
    spent = Book.open(folder).spent
    return tuple(spent.account(channel, Purpose.TRAINING).releases for channel in (Channel.HIDDEN, Channel.GRADIENT))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(f"{STEPS}._forward_done", 2, after=True),
        Fault(f"{STEPS}._finish", 2),
        Fault("fedsea.server.engine:Engine.finish", 2, after=True),
    ],
    ids=["forward-answered", "before-finish", "applied-not-durable"],
)
def test_a_server_that_is_killed_gets_the_same_bytes_again_and_nothing_is_charged_anew(federation, fault):
    fed = noised(federation)
    server = fed.spawn_server(fault)
    client = fed.spawn_client("a")
    server.wait_killed()
    server = fed.spawn_server()
    client.finish()
    server.finish()
    assert releases(fed) == (ONCE, ONCE)


@pytest.mark.parametrize(
    ("fault", "hidden", "gradient"),
    [
        (Fault("fedsea.privacy.ledger:Ledger.charge", 3, after=True), ONCE + 2, ONCE),
        (Fault("fedsea.privacy.ledger:Ledger.charge", 4, after=True), ONCE + 2, ONCE + 2),
        (Fault("fedsea.privacy.ledger:Ledger.charge", 3), ONCE, ONCE),
        (Fault("fedsea.client.remote_trunk:RemoteTrunk.backward", 2, after=True), ONCE + 2, ONCE + 2),
        (Fault("fedsea.client.state:ClientStore.prepare", 2, after=True), ONCE, ONCE),
    ],
    ids=["hidden-charged", "gradient-charged", "before-the-charge", "gradient-sent", "prepared"],
)
def test_a_client_that_is_killed_pays_again_for_what_it_draws_again(federation, fault, hidden, gradient):
    fed = noised(federation)
    server = fed.spawn_server()
    client = fed.spawn_client("a", fault)
    client.wait_killed()
    client = fed.spawn_client("a")
    client.finish()
    server.finish()
    assert releases(fed) == (hidden, gradient)
