"""What a client gives to a round's sum, when a server asks for it again, goes on without it, or withholds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsea.client.secure import SecureRounds
from fedsea.client.state import ClientState, Prepared
from fedsea.client.trainer import Trainer
from fedsea.errors import PrivacyError, StorageError
from fedsea.federation.secure import Advertisement, Aggregator, Layout, Setting
from fedsea.plan import parse_plan
from fedsea.privacy.boundary import Boundary
from fedsea.wire import messages as m
from tests.support.secure import Registry

NAMES = ("a", "b", "c")
EVERYBODYS, TWO_CLIENTS = "model.layers.0.x.lora_A.weight", "model.layers.1.x.lora_A.weight"
HELD = {"a": (EVERYBODYS, TWO_CLIENTS), "b": (EVERYBODYS, TWO_CLIENTS), "c": (EVERYBODYS,)}
LAYOUT = Layout.of({name: dict.fromkeys(held, (2, 2)) for name, held in HELD.items()})
PLAN = parse_plan(
    {
        "model": {"path": "m"},
        "clients": [{"name": name} for name in NAMES],
        "training": {"rounds": 3, "steps_per_round": 4},
        "aggregation": {"sync": "round", "secure": True, "secure_failure": "skip"},
    }
)
STOPS = PLAN.model_copy(update={"aggregation": PLAN.aggregation.model_copy(update={"secure_failure": "stop"})})


class Outbox:
    """A trunk that keeps what it is told, and plays events."""

    def __init__(self, *events: Any) -> None:
        self.messages: list[Any] = []
        self.next_event = iter(events).__next__

    def tell(self, message: m.Message) -> None:
        self.messages.append(message)

    def seal(self, release: Any) -> Any:
        return release.take()


class World:
    """Clients, and a server that may do with the protocol's messages what it likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        registry = Registry()
        self.notaries = {name: registry.enrol(name) for name in NAMES}
        self.values = {name: 1.0 + index for index, name in enumerate(NAMES)}
        self.weights = dict.fromkeys(NAMES, 2)
        self.outboxes = {name: Outbox() for name in NAMES}
        self.clients = {name: self.client(name) for name in NAMES}
        self.attempt = 0

    def client(self, name: str) -> SecureRounds:
        """As it is after a start, with what its folder holds."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return SecureRounds(PLAN, name, "run", LAYOUT, lambda: self.notaries[name], self.outboxes[name], folder)

    def restart(self) -> None:
        self.clients = {name: self.client(name) for name in NAMES}

    def note(self, name: str = "a") -> Path:
        return self.folder / name / "secure.json"

    def tell(self, name: str, message: Any) -> Any:
        self.clients[name].receive(message)
        return self.outboxes[name].messages.pop()

    def begin(self, name: str, round_index: int = 0) -> Any:
        def values() -> Any:
            return Boundary.of(PLAN, name).maskable({key: torch.full((2, 2), self.values[name]) for key in HELD[name]})

        opened = m.RoundOpen(round_index, self.attempt)
        self.clients[name].begin(opened, round_index, self.weights[name], values)
        return self.outboxes[name].messages.pop()

    def mask(self) -> Aggregator:
        """An attempt at round 0, up to where everybody's masked parameters are at the server."""
        self.attempt += 1
        place = 0, self.attempt
        server = Aggregator(Setting.of(PLAN, "run", *place, LAYOUT), NAMES, self.notaries["a"])
        for name in NAMES:
            keys = self.begin(name)
            columns = (keys.certificate, keys.sharing_key, keys.mask_key, keys.commitment, keys.signature)
            server.add_keys(Advertisement(name, *columns))
        server.proceed()
        ads = server.roster.values()
        rows = ((a.name, a.certificate, a.sharing_key, a.mask_key, a.commitment, a.signature) for a in ads)
        roster = m.SecureRoster(*place, *zip(*rows, strict=True))
        for name in NAMES:
            shares = self.tell(name, roster)
            server.add_shares(name, dict(zip(shares.names, shares.sealed, strict=True)))
        server.proceed()
        for name in NAMES:
            delivered = server.delivery(name)
            update = self.tell(name, m.SecureDelivery(*place, tuple(delivered), tuple(delivered.values())))
            server.accumulate(name, update.tensors)
            server.add_masked(name)
        server.proceed()
        return server

    def reveal(self, server: Aggregator) -> Mapping[str, torch.Tensor]:
        """The rest of it: the means."""
        place = server.setting.round, server.setting.attempt
        for name in NAMES:
            server.add_consent(name, self.tell(name, m.SecureSurvivors(*place, server.survivors)).signature)
        server.proceed()
        signed = server.signatures
        for name in NAMES:
            revealed = self.tell(name, m.SecureEvidence(*place, tuple(signed), tuple(signed.values())))
            server.add_reveal(name, dict(zip(revealed.names, revealed.shares, strict=True)))
        server.proceed()
        return server.unmask()[0]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("revealed", [False, True])
def test_a_round_has_one_weight_of_a_client_in_all_its_attempts(world: World, revealed: bool, restart: bool):
    """With other weights, as many sums as clients are a linear system, and show everybody's parameters."""
    server = world.mask()
    if revealed:
        world.reveal(server)
    if restart:
        world.restart()
    world.weights["a"] = 3  # it was made to go on with steps
    with pytest.raises(PrivacyError, match="sum of round 0 again, with a weight other than the noted one"):
        world.begin("a")
    assert world.outboxes["a"].messages == []
    world.begin("a", round_index=1)  # the next round has its own


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("revealed", [False, True])
def test_another_attempt_with_the_same_weight_gives_the_same_sum(world: World, revealed: bool, restart: bool):
    first = world.mask()
    means = world.reveal(first) if revealed else {}
    if restart:
        world.restart()
    else:
        world.values = dict.fromkeys(NAMES, 9.0)  # what was released once for the round is what is masked again
    again = world.reveal(world.mask())
    assert float(again[EVERYBODYS][0, 0]) == 2.0
    assert float(again[TWO_CLIENTS][0, 0]) == 1.5
    assert all(np.array_equal(means[key], again[key]) for key in means)


def test_the_note_of_a_retried_attempt_keeps_whose_sum_was_revealed(world: World):
    world.reveal(world.mask())
    before = json.loads(world.note().read_bytes())
    assert (before["weight"], before["survivors"]) == (2, list(NAMES))
    world.restart()
    world.mask()
    assert json.loads(world.note().read_bytes()) == before


def test_a_note_that_does_not_say_the_weight_allows_no_second_sum(world: World):
    world.note().write_text(json.dumps({"run_id": "run", "round": 0, "survivors": list(NAMES)}))
    with pytest.raises(PrivacyError, match="with a weight other than the noted one"):
        world.begin("a")
    with pytest.raises(PrivacyError, match="without the sum"):
        world.clients["a"].close_round(m.RoundResult(0, {}), 0)


@pytest.mark.parametrize("content", ["[]", '{"round": 0', '{"run_id": "run", "round": 0, "weight": 2}'])
def test_a_damaged_note_stops_a_round_a_step_and_a_result_without_parameters(world: World, content: str):
    world.note().write_text(content)
    client = world.clients["a"]
    for attempt in (
        lambda: world.begin("a"),
        lambda: client.open_step(0),
        lambda: client.close_round(m.RoundResult(0, {}), 0),
    ):
        with pytest.raises(StorageError, match="damaged"):
            attempt()


@pytest.mark.parametrize("restart", [False, True])
def test_no_step_follows_in_a_round_in_whose_sum_the_parameters_are(world: World, restart: bool):
    world.clients["a"].open_step(0)
    world.mask()  # not revealed by this client: what the others reveal is not known to it
    if restart:
        world.restart()
    with pytest.raises(PrivacyError, match="goes on with steps in round 0"):
        world.clients["a"].open_step(0)
    world.clients["a"].open_step(1)


def test_a_step_ends_an_attempt_that_was_begun_before_it(world: World):
    """Else later parameters would be masked, with a weight from before them."""
    world.attempt = 1
    keys = world.begin("a")
    world.clients["a"].open_step(0)
    world.clients["a"].receive(roster_of_one(keys))
    assert world.outboxes["a"].messages == []


def test_a_closed_round_reveals_nothing_more(world: World):
    """A server says first that it skips the round, and then has its sum revealed: it would not be missed."""
    world.mask()
    world.clients["a"].close_round(m.RoundResult(0, {}), 0)
    world.clients["a"].receive(m.SecureSurvivors(0, 1, NAMES))
    assert world.outboxes["a"].messages == []


@pytest.mark.parametrize("kept", [(), (EVERYBODYS,), (TWO_CLIENTS,)])
def test_a_revealed_sum_is_withheld_whole_or_in_part_from_nobody(world: World, kept: tuple[str, ...]):
    means = world.reveal(world.mask())
    for closed in (0, 1, 5):  # under a later round's number it is withheld all the same
        with pytest.raises(PrivacyError, match=rf"\({2 - len(kept)} of 2 are missing in the result\)"):
            world.clients["a"].close_round(m.RoundResult(closed, {key: means[key] for key in kept}), 0)
    world.clients["a"].close_round(m.RoundResult(0, dict(means)), 0)
    world.clients["c"].close_round(m.RoundResult(0, {EVERYBODYS: means[EVERYBODYS]}), 0)  # it holds no more


def test_a_round_is_skipped_without_a_sum_only_if_the_plan_says_so(world: World, tmp_path: Path):
    """Enough others may have revealed the sum that this client's parameters are in: it cannot know."""
    world.mask()
    client = world.clients["a"]
    client.close_round(m.RoundResult(0, {}), 0)
    client.open_step(1)
    unused: Any = None
    stops = SecureRounds(STOPS, "a", "run", LAYOUT, unused, unused, tmp_path / "a")
    for kept in ({}, {EVERYBODYS: torch.ones(2, 2)}):
        with pytest.raises(PrivacyError, match="without the sum that this client has given its parameters to"):
            stops.close_round(m.RoundResult(0, kept), 0)
    stops.close_round(m.RoundResult(0, dict.fromkeys(HELD["a"], torch.ones(2, 2))), 0)
    stops.close_round(m.RoundResult(1, {}), 1)  # of another round, which it gave nothing to


def roster_of_one(keys: Any) -> m.SecureRoster:
    """Too few for whoever answers it."""
    row = ("a", keys.certificate, keys.sharing_key, keys.mask_key, keys.commitment, keys.signature)
    return m.SecureRoster(0, 1, *((column,) for column in row))


class Store:
    """A client's state two steps into round 0, with a third one prepared; the disk is full."""

    folder = Path("no folder")

    def __init__(self) -> None:
        self.state = ClientState(next_step=2, updates=2, round_tokens=2)
        self.prepared = Prepared(2, 1, 1.0, 1.0, {}, {})

    def save(self, state: ClientState, tensors: Any) -> None:
        self.state = state

    def flush(self) -> None:
        raise StorageError("The disk is full.")


def trainer(world: World, *events: Any) -> Trainer:
    """One that takes these events next."""
    parts = SimpleNamespace(apply=lambda *_: None, tensors=dict, restore=lambda _: None, step=lambda _: None)
    return Trainer(PLAN, parts, parts, Outbox(*events), Store(), None, parts, secure=world.clients["a"])  # type: ignore[arg-type]


def test_the_training_loop_asks_before_a_step(world: World):
    world.mask()
    with pytest.raises(PrivacyError, match="goes on with steps in round 0"):
        trainer(world, m.StepOpen(2, 0))._follow()


def test_the_training_loop_asks_before_it_takes_a_result(world: World):
    means = world.reveal(world.mask())
    with pytest.raises(PrivacyError, match="1 of 2 are missing in the result"):
        trainer(world, m.RoundResult(0, {EVERYBODYS: means[EVERYBODYS]}))._follow()


def test_a_step_that_is_applied_ends_an_attempt_that_was_begun_before_it(world: World):
    world.attempt = 1
    keys = world.begin("a")
    done = m.StepDone(2, 1, 1.0, {})
    with pytest.raises(StopIteration):
        trainer(world, done, roster_of_one(keys))._follow()
    assert world.outboxes["a"].messages == []


def test_parameters_are_masked_only_when_they_are_durable(world: World):
    """After a kill, the noted weight would go with others, of a step that is applied again."""
    with pytest.raises(StorageError):
        trainer(world)._maskable()
