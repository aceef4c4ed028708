"""Connections that break while a client computes, prepares or evaluates, and at random moments: not one bit changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.fault.blips import EVALUATE, HEAD, PREPARE, Line, before, disturb_at_random, impatient, strike_once
from tests.support.federation import Federation, assert_same_bits
from tests.support.processes import Fault

# Without dropout: these parts are threads of one process, whose generator they would share.
MODES: dict[str, dict[str, Any]] = {
    "round": {},
    "step": {"aggregation": {"sync": "step"}, "adapter": {"input": "frozen"}},
    "sequential": {"training": {"mode": "sequential", "steps_per_round": 2}},
    "personal": {"aggregation": {"sync": "personal"}},
}
SEVERAL = {"several-in-flight": {"training": {"micro_batches": 2}}}
BOUNDED = {"training": {"wait": 2.0, "min_clients": 1}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base_model, identities) -> Callable[[str], Federation]:
    """A run of a mode in which nothing happens, made once."""
    made: dict[str, Federation] = {}

    def get(mode: str) -> Federation:
        if mode not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / mode
            made[mode] = federation = Federation(folder, base_model, identities, ("a", "b"), (MODES | SEVERAL)[mode])
            federation.train()
        return made[mode]

    return get


def run(fed: Federation, prepare: Callable[[dict[str, Line]], None]) -> dict[str, Line]:
    """A run of clients a and b, each behind a line that `prepare` may break."""
    with ExitStack() as stack:
        lines = {name: stack.enter_context(Line(fed, name)) for name in ("a", "b")}
        prepare(lines)
        parts = [fed.start_client(name, line, server=line.proxy.address, evaluate=True) for name, line in lines.items()]
        for part in (*parts, fed.server):
            part.finish()
    return lines


@pytest.mark.parametrize("mode", MODES)
def test_connections_that_break_while_a_client_computes_prepares_and_evaluates_change_no_bit(
    federation, undisturbed, monkeypatch, mode
):
    whole = undisturbed(mode)
    impatient(monkeypatch)
    fed = federation("a", "b", **MODES[mode])
    fed.start_server()

    def break_at_all_points(lines: dict[str, Line]) -> None:
        before(monkeypatch, HEAD, strike_once(lines["a"], 2))
        before(monkeypatch, PREPARE, strike_once(lines["a"], 3))
        before(monkeypatch, EVALUATE, strike_once(lines["b"], 1))

    lines = run(fed, break_at_all_points)
    assert {name: line.num_cuts for name, line in lines.items()} == {"a": 2, "b": 1}
    assert_same_bits(fed, whole)


def test_a_prepared_step_that_a_restarted_server_lost_is_done_again_although_the_connection_breaks_before(
    federation, undisturbed, monkeypatch
):
    whole = undisturbed("round")
    impatient(monkeypatch)
    fed = federation("a", "b", **MODES["round"])
    server = fed.spawn_server()
    killed = fed.spawn_client("a", Fault("fedsea.client.state:ClientStore.prepare", 1, after=True))
    waiting = fed.spawn_client("b", Fault("fedsea.client.state:ClientStore.prepare", 1, after=True))
    killed.wait_killed()
    waiting.wait_killed()
    server.kill()
    fed.start_server()
    lines = run(fed, lambda lines: before(monkeypatch, EVALUATE, strike_once(lines["a"], 1)))
    assert lines["a"].num_cuts == 1
    assert_same_bits(fed, whole)


@pytest.mark.parametrize("mode", MODES | SEVERAL)
def test_connections_that_break_at_random_change_no_bit(federation, undisturbed, monkeypatch, mode):
    whole = undisturbed(mode)
    impatient(monkeypatch)
    fed = federation("a", "b", **(MODES | SEVERAL)[mode])
    fed.start_server()
    lines = run(fed, lambda lines: disturb_at_random(monkeypatch, lines, mode, num_cuts=12))
    assert min(line.num_cuts for line in lines.values()) >= 6
    assert_same_bits(fed, whole)


def test_connections_that_break_at_random_end_no_run_that_waits_for_a_bounded_time(federation, monkeypatch):
    impatient(monkeypatch)
    fed = federation("a", "b", **BOUNDED)
    fed.start_server()
    run(fed, lambda lines: disturb_at_random(monkeypatch, lines, "bounded", num_cuts=12))
    durable = fed.durable()
    assert (durable["server"][1]["next_step"], durable["server"][1]["rounds_done"]) == (6, 2)
    assert {durable[name][1]["state"]["rounds_done"] for name in ("a", "b")} == {2}
