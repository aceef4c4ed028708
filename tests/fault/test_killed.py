"""SIGKILL at chosen points of a step or round, restart, and the same bits as a run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.federation import Federation, assert_same_bits
from tests.support.processes import Fault

STORE = "fedsea.client.state:ClientStore"
TRAINER = "fedsea.client.trainer:Trainer"
SERVER_STORE = "fedsea.server.state:ServerStore"
COORDINATOR = "fedsea.server.coordinator:Coordinator"
STEPS = "fedsea.server.steps:StepRunner"

MODES: dict[str, dict[str, Any]] = {
    "sequential": {"training": {"mode": "sequential", "steps_per_round": 2, "micro_batches": 2}},
    "round": {"adapter": {"dropout": 0.2}, "training": {"micro_batches": 2}, "clients": {"b": {"input_blocks": 2}}},
    "step": {"aggregation": {"sync": "step"}, "clients": {"b": {"output_blocks": 2, "micro_batches": 2}}},
    "personal": {"aggregation": {"sync": "personal"}, "adapter": {"dropout": 0.2}},
    "bounded": {"training": {"wait": 2.0, "min_clients": 2, "steps_per_round": 2}},
}

Make = Callable[..., Federation]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base_model, identities) -> Callable[[str], Federation]:
    """A run of a mode in which nothing happens, made once."""
    made: dict[str, Federation] = {}

    def get(mode: str) -> Federation:
        if mode not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / mode
            made[mode] = federation = Federation(folder, base_model, identities, ("a", "b"), MODES[mode])
            server = federation.spawn_server()
            for child in [*(federation.spawn_client(name) for name in ("a", "b")), server]:
                child.finish()
        return made[mode]

    return get


CLIENT_FAULTS = {
    "before-forward": Fault(f"{TRAINER}._micro_batches", 2),
    "before-prepare": Fault(f"{STORE}.prepare", 2),
    "prepared-not-told": Fault(f"{STORE}.prepare", 2, after=True),
    "told-not-applied": Fault(f"{TRAINER}._apply", 2),
    "applied-not-durable": Fault("fedsea.client.segments:ClientSegments.apply", 2, after=True),
    "half-written": Fault("fedsea.storage:_sync", 5),
    "durable": Fault(f"{STORE}.save", 3, after=True),
    "before-first-step": Fault(f"{STORE}.save", 1, after=True),
}

SERVER_FAULTS = {
    "forward-sent": Fault(f"{STEPS}._forward_done", 2, after=True),
    "before-finish": Fault(f"{STEPS}._finish", 2),
    "applied-not-durable": Fault("fedsea.server.engine:Engine.finish", 2, after=True),
    "half-written": Fault("fedsea.storage:_sync", 9),
    "durable-not-told": Fault(f"{SERVER_STORE}.save", 3, after=True),
    "told": Fault(f"{COORDINATOR}.applied", 2, after=True),
}

ROUND_FAULTS = {
    "client-asked": ("a", Fault(f"{TRAINER}._take_round", 1)),
    "client-took-it": ("b", Fault(f"{TRAINER}._take_round", 1, after=True)),
    "server-averages": ("server", Fault(f"{SERVER_STORE}.save_round", 1)),
    "server-between-files": ("server", Fault("fedsea.storage:CheckpointStore.save", 5, after=True)),
    "server-averaged": ("server", Fault(f"{SERVER_STORE}.save_round", 1, after=True)),
}


def disturbed(federation: Make, mode: str, who: str, *faults: Fault) -> Federation:
    """A run in which one process is killed by each of the faults in turn, and started again."""
    fed = federation("a", "b", **MODES[mode])
    children = {"server": fed.spawn_server(*faults[:1] if who == "server" else ())}
    for name in ("a", "b"):
        children[name] = fed.spawn_client(name, *faults[:1] if who == name else ())
    for number in range(len(faults)):
        children[who].wait_killed()
        following = faults[number + 1 : number + 2]
        children[who] = fed.spawn_server(*following) if who == "server" else fed.spawn_client(who, *following)
    for name in ("a", "b", "server"):
        children[name].finish()
    return fed


@pytest.mark.parametrize("point", CLIENT_FAULTS)
def test_a_client_killed_in_a_batched_step_changes_no_bit(federation, undisturbed, point):
    assert_same_bits(disturbed(federation, "round", "a", CLIENT_FAULTS[point]), undisturbed("round"))


@pytest.mark.parametrize("point", SERVER_FAULTS)
def test_a_server_killed_in_a_batched_step_changes_no_bit(federation, undisturbed, point):
    assert_same_bits(disturbed(federation, "round", "server", SERVER_FAULTS[point]), undisturbed("round"))


@pytest.mark.parametrize("point", ROUND_FAULTS)
def test_a_kill_at_the_end_of_a_round_changes_no_bit(federation, undisturbed, point):
    who, fault = ROUND_FAULTS[point]
    assert_same_bits(disturbed(federation, "round", who, fault), undisturbed("round"))


@pytest.mark.parametrize("mode", ["sequential", "step", "personal"])
@pytest.mark.parametrize("point", ["prepared-not-told", "told-not-applied"])
def test_a_client_killed_in_other_modes_changes_no_bit(federation, undisturbed, mode, point):
    assert_same_bits(disturbed(federation, mode, "b", CLIENT_FAULTS[point]), undisturbed(mode))


@pytest.mark.parametrize("mode", ["sequential", "step", "personal"])
@pytest.mark.parametrize("point", ["before-finish", "durable-not-told"])
def test_a_server_killed_in_other_modes_changes_no_bit(federation, undisturbed, mode, point):
    assert_same_bits(disturbed(federation, mode, "server", SERVER_FAULTS[point]), undisturbed(mode))


def test_a_server_killed_after_a_later_clients_first_step_changes_no_bit(federation, undisturbed):
    fault = Fault(f"{COORDINATOR}.applied", 3)  # steps 0 and 1 were the other client's turn
    assert_same_bits(disturbed(federation, "sequential", "server", fault), undisturbed("sequential"))


def test_killing_the_same_client_again_after_its_restart_changes_no_bit(federation, undisturbed):
    faults = (CLIENT_FAULTS["prepared-not-told"], Fault(f"{TRAINER}._apply", 1), CLIENT_FAULTS["half-written"])
    assert_same_bits(disturbed(federation, "round", "b", *faults), undisturbed("round"))


@pytest.mark.parametrize(
    ("at_server", "at_client"),
    [
        (f"{STEPS}._finish", f"{TRAINER}._apply"),
        (f"{SERVER_STORE}.save", f"{STORE}.prepare"),
    ],
)
def test_server_and_client_killed_at_once_change_no_bit(federation, undisturbed, at_server, at_client):
    fed = federation("a", "b", **MODES["round"])
    server = fed.spawn_server(Fault(at_server, 3, action="halt"))
    first = fed.spawn_client("a", Fault(at_client, 2))
    second = fed.spawn_client("b")
    first.wait_killed()
    server.kill()
    children = [fed.spawn_server(), fed.spawn_client("a"), second]
    for child in children:
        child.finish()
    assert_same_bits(fed, undisturbed("round"))


BOUNDED_FAULTS = {
    "client-in-the-last-step": ("b", Fault(f"{STORE}.prepare", 4, after=True)),
    "client-asked-for-its-parameters": ("b", Fault("fedsea.client.segments:ClientSegments.parameters", 1)),
    "client-takes-the-round": ("b", Fault(f"{TRAINER}._take_round", 1)),
    "client-before-its-goodbye": ("b", Fault("fedsea.client.remote_trunk:RemoteTrunk.close", 1)),
    "server-in-the-last-step": ("server", Fault(f"{STEPS}._finish", 4)),
    "server-averages": ("server", Fault(f"{SERVER_STORE}.save_round", 1)),
    "server-averaged-the-last": ("server", Fault(f"{SERVER_STORE}.save_round", 2, after=True)),
}


@pytest.mark.parametrize("point", BOUNDED_FAULTS)
def test_a_kill_while_others_wait_for_a_bounded_time_lets_everybody_finish(federation, point):
    who, fault = BOUNDED_FAULTS[point]
    durable = disturbed(federation, "bounded", who, fault).durable()
    assert durable["server"][1]["next_step"] == 4
    assert durable["server"][1]["rounds_done"] == 2
    assert durable["a"][1]["state"]["rounds_done"] == durable["b"][1]["state"]["rounds_done"] == 2
    name = next(n for n in durable["a"][0] if n.startswith("parameter."))
    assert torch.equal(durable["a"][0][name], durable["b"][0][name]), "both end with the last round's average"
