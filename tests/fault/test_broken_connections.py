"""Connections that break in the middle of steps, without any process dying; and clients that others do not wait for."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.support.federation import assert_same_bits
from tests.support.processes import Fault
from tests.support.proxy import CuttingProxy

MODES = {
    "round": {"training": {"micro_batches": 2}},
    "step": {"aggregation": {"sync": "step"}},
    "sequential": {"training": {"mode": "sequential", "steps_per_round": 2}},
}


@pytest.mark.parametrize("mode", MODES)
def test_connections_that_break_in_the_middle_change_no_bit(federation, mode):
    whole = federation("a", "b", **MODES[mode])
    whole.start_server()
    with CuttingProxy(whole.address) as proxy:
        parts = [whole.start_client(name, server=proxy.address) for name in ("a", "b")]
        for part in (*parts, whole.server):
            part.finish()
    total = proxy.num_bytes_up // 2

    cut = federation("a", "b", **MODES[mode])
    cut.start_server()
    with ExitStack() as stack:
        parts = []
        for name, shares in (("a", (0.35, 0.6, 0.8)), ("b", (0.3, 0.5, 0.7, 0.9))):
            proxy = stack.enter_context(CuttingProxy(cut.address, [int(total * share) for share in shares]))
            parts.append((cut.start_client(name, server=proxy.address), proxy, len(shares)))
        for part, proxy, num_cuts in parts:
            part.finish()
            assert proxy.num_cuts == num_cuts
        cut.server.finish()
    assert_same_bits(cut, whole)


def test_others_go_on_without_a_killed_client_and_it_joins_later(federation):
    fed = federation("a", "b", training={"wait": 0.2, "min_clients": 1, "steps_per_round": 10, "rounds": 2})
    server = fed.spawn_server()
    gone = fed.spawn_client("b", Fault("fedsea.client.state:ClientStore.prepare", 2, after=True))
    stays = fed.spawn_client("a", Fault("fedsea.client.state:ClientStore.save", 8, action="halt"))
    gone.wait_killed()
    stays.wait_for("fault")
    stays.kill()
    back = [fed.spawn_client("b"), fed.spawn_client("a")]
    for child in (*back, server):
        child.finish()
    durable = fed.durable()
    came_back = durable["b"][1]["state"]
    assert came_back["next_step"] > 8
    assert came_back["updates"] < came_back["next_step"] - 4  # without it, at least these steps were made
    assert durable["a"][1]["state"]["rounds_done"] == came_back["rounds_done"] == 2
    assert durable["server"][1]["next_step"] == 20
