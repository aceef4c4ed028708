"""SIGKILL in the middle of a secure round: it is begun anew with fresh keys, and its result is that of a plain run."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from fedsea.client.secure import SecureRounds
from fedsea.errors import PrivacyError
from fedsea.federation.secure import Member
from fedsea.wire import messages as m
from tests.support.federation import Federation
from tests.support.processes import Fault

NAMES = ("a", "b", "c")
PLAN = {"training": {"rounds": 1, "steps_per_round": 2}}
MEMBER = "fedsea.federation.secure.member:Member"
AGGREGATOR = "fedsea.federation.secure.aggregator:Aggregator"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base_model, identities) -> dict[str, torch.Tensor]:
    """The mean of a run without secure aggregation."""
    federation = Federation(tmp_path_factory.mktemp("plain") / "run", base_model, identities, NAMES, PLAN)
    for child in [federation.spawn_server(), *(federation.spawn_client(name) for name in NAMES)][::-1]:
        child.finish()
    return federation.durable()["rounds"][0]


FAULTS = {
    "client-before-sharing": ("a", Fault(f"{MEMBER}.share")),
    "client-masked-not-sent": ("b", Fault(f"{MEMBER}.mask", after=True)),
    "client-after-masking": ("a", Fault(f"{MEMBER}.consent")),
    "client-noted-not-revealed": ("c", Fault("fedsea.client.secure:SecureRounds._write_note", after=True)),
    "server-adding": ("server", Fault(f"{AGGREGATOR}.accumulate", 2)),
    "server-before-unmasking": ("server", Fault(f"{AGGREGATOR}.unmask")),
    "server-unmasked-not-durable": ("server", Fault("fedsea.server.state:ServerStore.save_round")),
}


@pytest.mark.parametrize("point", FAULTS)
def test_a_kill_in_a_secure_round_changes_nothing_but_the_masks(federation, plain, point):
    who, fault = FAULTS[point]
    fed = federation(*NAMES, aggregation={"secure": True}, **PLAN)
    children = {"server": fed.spawn_server(*[fault] if who == "server" else [])}
    for name in NAMES:
        children[name] = fed.spawn_client(name, *[fault] if who == name else [])
    children[who].wait_killed()
    children[who] = fed.spawn_server() if who == "server" else fed.spawn_client(who)
    for name in (*NAMES, "server"):
        children[name].finish()
    found = fed.durable()["rounds"][0]
    assert found.keys() == plain.keys()
    for name, mean in plain.items():
        torch.testing.assert_close(found[name], mean, rtol=2**-23, atol=2**-28)


def test_a_client_that_has_revealed_helps_to_no_second_sum_over_others(federation, monkeypatch):
    """A server that pretends to have crashed asks for the sum again, without one client: the difference is that one."""
    run = federation(
        *NAMES,
        "d",
        training={"rounds": 1, "steps_per_round": 1, "wait": 50.0, "min_clients": 4},
        aggregation={"secure": True},
    )
    revealed = threading.Barrier(4, timeout=50.0)
    write = SecureRounds._write_note

    def noted(self: SecureRounds, member: Member) -> None:
        write(self, member)
        revealed.wait()
        raise KeyboardInterrupt  # as if the process ended before its answer left

    monkeypatch.setattr(SecureRounds, "_write_note", noted)
    server = run.start_server()
    parts = [run.start_client(name) for name in run.names]
    for part in parts:
        with pytest.raises(KeyboardInterrupt):
            part.finish()
    server.stop()
    note = run.folder / "server" / "secure.json"
    assert json.loads(note.read_bytes())["survivors"] == list(run.names)
    note.unlink()  # a server that does not want to know
    monkeypatch.setattr(SecureRounds, "_write_note", write)
    receive = SecureRounds.receive

    def silent(self: SecureRounds, message: object) -> None:
        if self._name == "d" and isinstance(message, m.SecureRoster):
            raise KeyboardInterrupt
        receive(self, message)

    monkeypatch.setattr(SecureRounds, "receive", silent)
    run.start_server()
    parts = [run.start_client(name) for name in run.names]
    with pytest.raises(KeyboardInterrupt):
        parts[3].finish()
    for part in parts[:3]:
        with pytest.raises(PrivacyError, match="second sum of round 0 over other clients"):
            part.finish()
