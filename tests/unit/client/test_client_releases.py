"""How often a server that lies can have one text released anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.client.releases import MOST_RELEASES, ReleaseNote, Releases
from fedsea.errors import PrivacyError, StorageError
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


@pytest.fixture
def note(tmp_path: Path) -> ReleaseNote:
    return ReleaseNote(tmp_path / "releases.json")


def releases_of(note: ReleaseNote, ledger: Ledger | None, plan: FederationPlan = PLAN) -> Releases:
    made = Releases(Opened(), Boundary.of(plan, "a", ledger), note)  # type: ignore[arg-type]
    made.begin(0)
    return made


def started_again(note: ReleaseNote, ledger: Ledger, update: int = 0) -> Releases:
    made = Releases(Opened(), Boundary.of(PLAN, "a", ledger), note)  # type: ignore[arg-type]
    made.resume(update)
    made.begin(update)
    return made


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
    note, ledger, ask: Callable[..., Any]
):
    releases, batch, channel = releases_of(note, ledger), text(), WAYS[ask]
    for attempt in range(MOST_RELEASES):
        ask(releases, batch, attempt)
    with pytest.raises(PrivacyError, match=f"releases of one text on the {channel} channel.*no other is sent"):
        ask(releases, batch, MOST_RELEASES)
    assert ledger.spent.account(channel, Purpose.TRAINING).releases == MOST_RELEASES


@pytest.mark.parametrize("ask", WAYS)
def test_other_texts_have_releases_of_their_own(note, ledger, ask: Callable[..., Any]):
    releases = releases_of(note, ledger)
    for attempt in range(3 * MOST_RELEASES):
        releases.begin(attempt)
        ask(releases, text(), attempt)
        releases.forget()
    assert ledger.spent.account(WAYS[ask], Purpose.TRAINING).releases == 3 * MOST_RELEASES


def only_update(releases: Releases, attempt: int) -> Any:
    return releases.update(("round", attempt), {"x": torch.ones(2)}, {"x": torch.zeros(2)})


ALONE: dict[Channel, Callable[[Releases, int], Any]] = {
    Channel.HIDDEN: lambda releases, attempt: hidden(releases, text(), attempt),
    Channel.GRADIENT: lambda releases, _: releases.gradient(0, text(), torch.ones(TOKENS, 4), torch.ones(TOKENS, 4)),
    Channel.UPDATE: only_update,
}


@pytest.mark.parametrize("channel", ALONE)
def test_starting_the_client_again_does_not_begin_the_count_anew(note, ledger, channel: Channel):
    ask = ALONE[channel]
    ask(releases_of(note, ledger), 0)  # noted nowhere, as nothing is wrong yet
    for attempt in range(1, MOST_RELEASES):
        ask(started_again(note, ledger), attempt)
    with pytest.raises(PrivacyError, match=rf"{channel} channel.*again without .*releases\.json"):
        ask(started_again(note, ledger), MOST_RELEASES)
    assert ledger.spent.account(channel, Purpose.TRAINING).releases == MOST_RELEASES


def test_releases_before_a_start_count_with_those_after_it(note, ledger):
    releases, batch = releases_of(note, ledger), text()
    for attempt in range(MOST_RELEASES - 1):
        hidden(releases, batch, attempt)
    hidden(started_again(note, ledger), batch, 0)
    with pytest.raises(PrivacyError):
        hidden(started_again(note, ledger), batch, 1)


def test_a_client_that_is_started_again_in_a_later_update_has_its_releases(note, ledger):
    for attempt in range(MOST_RELEASES):
        hidden(releases_of(note, ledger), text(), attempt)
    again = started_again(note, ledger, update=1)
    for attempt in range(MOST_RELEASES - 1):  # one may have left before, unnoted
        hidden(again, text(), attempt)


def test_a_step_in_order_writes_no_note(note, ledger):
    releases = releases_of(note, ledger)
    for ask in (gradient, update):
        ask(releases, text(), 0)
    assert not note.path.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"update": 0, "released": {"hidden 0": "x"}}'])
def test_a_damaged_note_stops_the_client(note, ledger, content: bytes):
    note.path.write_bytes(content)
    with pytest.raises(StorageError, match=r"releases\.json is damaged.*new run folder"):
        started_again(note, ledger)


def test_the_same_answer_gets_the_same_bytes_however_often_it_comes(note, ledger):
    releases, batch = releases_of(note, ledger), text()
    first = gradient(releases, batch, 0)
    assert all(gradient(releases, batch, 0) is first for _ in range(2 * MOST_RELEASES))


def test_parameters_that_came_from_the_server_are_no_text(note, ledger):
    releases = releases_of(note, ledger)
    for number in range(2 * MOST_RELEASES):
        releases.update(("round", number), {"x": torch.ones(2)}, {"x": torch.ones(2)})


@pytest.mark.parametrize("plan", [noised({}, trust={"mode": "trusted-server"}), noised({"hidden_std": 1.0})])
def test_without_noise_there_is_nothing_to_average_out(note, plan):
    releases, batch = releases_of(note, None, plan), text()
    for attempt in range(2 * MOST_RELEASES):
        gradient(releases, batch, attempt)
    assert not note.path.exists()
