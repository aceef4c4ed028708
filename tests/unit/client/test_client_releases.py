"""How often a server that lies can have one text released anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.client.releases import MOST_RELEASES, Releases
from fedsea.errors import PrivacyError
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.ledger import Ledger
from fedsea.types import Channel, Purpose, Release, TokenBatch
from tests.unit.privacy.plans import CLAIMED, noised

TOKENS = 3
PLAN = noised({**CLAIMED, "update_std": 4.0, "update_clip": 1.0})


class Opened:
    """Stands for a trunk: what is sealed can be read."""

    def seal(self, release: Release) -> Any:
        return release.take()


def text() -> TokenBatch:
    return TokenBatch(torch.zeros(TOKENS), torch.zeros(TOKENS), (TOKENS,), ("document",), (0,))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path, PLAN, "a") as opened:
        yield opened


def releases_of(ledger: Ledger | None, plan: FederationPlan = PLAN) -> Releases:
    return Releases(Opened(), Boundary.of(plan, "a", ledger))  # type: ignore[arg-type]


def hidden(releases: Releases, batch: TokenBatch, _attempt: int) -> Any:
    releases.forget()  # the server closed a round, over and over
    return releases.hidden(0, batch, torch.ones(TOKENS, 4))


def gradient(releases: Releases, batch: TokenBatch, attempt: int) -> Any:
    releases.hidden(0, batch, torch.ones(TOKENS, 4))
    return releases.gradient(0, batch, torch.full((TOKENS, 4), 1 + attempt * 1e-6), torch.ones(TOKENS, 4))


def update(releases: Releases, batch: TokenBatch, attempt: int) -> Any:
    releases.hidden(0, batch, torch.ones(TOKENS, 4))
    return releases.update(("round", attempt), {"x": torch.ones(2)}, {"x": torch.zeros(2)})


def maskable(releases: Releases, batch: TokenBatch, _attempt: int) -> Any:
    releases.hidden(0, batch, torch.ones(TOKENS, 4))
    return releases.maskable({"x": torch.ones(2)}, {"x": torch.zeros(2)})


WAYS = {
    hidden: Channel.HIDDEN,
    gradient: Channel.GRADIENT,
    update: Channel.UPDATE,
    maskable: Channel.UPDATE,
}


@pytest.mark.parametrize("ask", WAYS)
def test_a_text_is_released_anew_a_few_times_all_of_them_charged_and_then_the_client_stops(
    ledger, ask: Callable[..., Any]
):
    releases, batch, channel = releases_of(ledger), text(), WAYS[ask]
    for attempt in range(MOST_RELEASES):
        ask(releases, batch, attempt)
    with pytest.raises(PrivacyError, match=f"releases of one text on the {channel} channel.*no other is sent"):
        ask(releases, batch, MOST_RELEASES)
    assert ledger.spent.account(channel, Purpose.TRAINING).releases == MOST_RELEASES


@pytest.mark.parametrize("ask", WAYS)
def test_other_texts_have_releases_of_their_own(ledger, ask: Callable[..., Any]):
    releases = releases_of(ledger)
    for attempt in range(3 * MOST_RELEASES):
        ask(releases, text(), attempt)
        releases.forget()
    assert ledger.spent.account(WAYS[ask], Purpose.TRAINING).releases == 3 * MOST_RELEASES


def test_the_same_answer_gets_the_same_bytes_however_often_it_comes(ledger):
    releases, batch = releases_of(ledger), text()
    first = gradient(releases, batch, 0)
    assert all(gradient(releases, batch, 0) is first for _ in range(2 * MOST_RELEASES))


def test_parameters_that_came_from_the_server_are_no_text(ledger):
    releases = releases_of(ledger)
    for number in range(2 * MOST_RELEASES):
        releases.update(("round", number), {"x": torch.ones(2)}, {"x": torch.ones(2)})


@pytest.mark.parametrize("plan", [noised({}, trust={"mode": "trusted-server"}), noised({"hidden_std": 1.0})])
def test_without_noise_there_is_nothing_to_average_out(plan):
    releases, batch = releases_of(None, plan), text()
    for attempt in range(2 * MOST_RELEASES):
        gradient(releases, batch, attempt)
