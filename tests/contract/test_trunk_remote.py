"""What only a trunk at a server can meet: broken streams, attempts that are given up, other clients, other plans."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fedsea.client import remote_trunk
from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.trunk import Connected, Standing, StepInterrupted
from fedsea.errors import AuthError, ConfigError, ProtocolError, TransportError, UnprotectedRelease
from fedsea.server.executor.local import Priority
from fedsea.types import BlockRange
from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream, connect
from fedsea.wire.encoding import Encoded
from fedsea.wire.transport import Timing
from tests.contract.trunks import BOUNDARY, DEADLINE_S, Bench, get, remote_bench, values, where
from tests.support.federation import ServerThread
from tests.support.proxy import CuttingProxy

PLAN = {"training": {"rounds": 1, "steps_per_round": 2, "micro_batch_sequences": 3}}


@pytest.fixture
def bench(federation) -> Iterator[Bench]:
    made = remote_bench(federation("a", **PLAN))
    yield made
    made.close()


@pytest.fixture
def proxy(bench: Bench) -> Iterator[CuttingProxy]:
    with CuttingProxy(bench.federation.address) as proxy:
        yield proxy


@pytest.fixture
def spy(monkeypatch) -> list[Encoded]:
    """Everything that a client hands to its stream, in order."""
    seen: list[Encoded] = []
    original = ClientStream.send

    async def send(self: ClientStream, message: m.Message | Encoded) -> Encoded:
        encoded = await original(self, message)
        seen.append(encoded)
        return encoded

    monkeypatch.setattr(ClientStream, "send", send)
    return seen


def opened(trunk: RemoteTrunk, attempt: int = 0) -> RemoteTrunk:
    assert trunk.next_event() == Connected()
    assert trunk.next_event() == m.StepOpen(0, attempt)
    return trunk


def on_loop(server: ServerThread, call: Callable[[], object]) -> None:
    """Run a call on the server's event loop."""
    done: Future[None] = Future()

    def run() -> None:
        call()
        done.set_result(None)

    assert server._loop is not None
    server._loop.call_soon_threadsafe(run)
    done.result(DEADLINE_S)


class Blocked:
    """The engine does nothing until this is left."""

    def __init__(self, server: ServerThread) -> None:
        self._server = server
        self._release = threading.Event()

    def __enter__(self) -> None:
        def block() -> None:
            assert self._release.wait(DEADLINE_S)

        service = self._server.service
        assert service is not None
        on_loop(self._server, lambda: service.submit(Priority.CONTROL, block, lambda _: None))

    def __exit__(self, *_: object) -> None:
        self._release.set()


def test_a_lost_connection_interrupts_the_step_and_resends_the_same_bytes(bench, proxy, spy):
    trunk = opened(bench.trunk(address=proxy.address))
    sealed = trunk.seal(BOUNDARY.hidden(values(0)))
    with Blocked(bench.federation.server):
        future = trunk.forward(where(), sealed)
        proxy.cut()
        with pytest.raises(StepInterrupted):
            get(future)
    opened(trunk)
    assert torch.equal(get(trunk.forward(where(), sealed)), bench.direct.run(values(0), values(1))[0])
    forwards = [encoded.chunks for encoded in spy if encoded.kind == "Forward"]
    assert len(set(forwards)) == 1


def test_whoever_read_that_the_server_was_lost_reads_that_it_is_back(bench, proxy, caplog):
    with caplog.at_level(logging.INFO, "fedsea.client"):
        trunk = opened(bench.trunk(address=proxy.address))
        again = f"connected to {proxy.address} again"
        assert again not in caplog.messages
        proxy.cut()
        opened(trunk)
    assert caplog.messages[-1] == again


def test_the_outcome_is_told_after_a_reconnection(bench, proxy):
    standing = Standing()
    trunk = bench.open(Standing(), address=proxy.address)
    trunk._standing = lambda: standing
    bench.opened.append(trunk)
    opened(trunk)
    get(trunk.forward(where(), trunk.seal(BOUNDARY.hidden(values(0)))))
    get(trunk.backward(where(), trunk.seal(BOUNDARY.gradient(values(1)))))
    standing = Standing(next_step=0, prepared_step=0)
    trunk.ready(0, 0, 7, 1.0, trunk.seal(BOUNDARY.update({})))
    assert isinstance(first := trunk.next_event(), m.StepDone)
    assert trunk.next_event() == m.StepOpen(1, 0)
    proxy.cut()
    assert trunk.next_event() == Connected()
    assert trunk.next_event() == first


def test_an_evaluation_survives_a_lost_connection(bench, proxy, spy):
    trunk = opened(bench.trunk(address=proxy.address))
    with Blocked(bench.federation.server):
        future = trunk.evaluate(where(9), trunk.seal(BOUNDARY.hidden(values(3))))
        proxy.cut()
        assert trunk.next_event() == Connected()
    assert torch.equal(get(future), bench.direct.run(values(3), values(0))[0])


def test_a_new_attempt_interrupts_what_was_asked_for_the_old_one(bench):
    trunk = opened(bench.trunk())
    sealed = trunk.seal(BOUNDARY.hidden(values(0)))
    server = bench.federation.server
    with Blocked(server):
        future = trunk.forward(where(), sealed)
        on_loop(server, server.service.coordinator.steps.restart)
    with pytest.raises(StepInterrupted):
        get(future)
    assert trunk.next_event() == m.StepOpen(0, 1)
    with pytest.raises(StepInterrupted):
        get(trunk.forward(where(), sealed))
    get(trunk.forward(where(attempt=1), sealed))


def test_nothing_leaves_a_client_but_releases_of_the_right_kind(bench, spy):
    trunk = opened(bench.trunk())
    with pytest.raises(UnprotectedRelease):
        trunk.forward(where(), {"": values(0)})
    with pytest.raises(UnprotectedRelease):
        trunk.forward(where(), trunk.seal(BOUNDARY.gradient(values(0))))
    with pytest.raises(UnprotectedRelease):
        trunk.backward(where(), trunk.seal(BOUNDARY.hidden(values(0))))
    trunk.close(0)
    assert {encoded.kind for encoded in spy} == {"Hello", "Join", "Finished"}


def test_a_second_process_of_a_client_replaces_the_first(bench):
    first = opened(bench.trunk())
    opened(bench.trunk())
    with pytest.raises(AuthError, match="only one may train"):
        first.next_event()


def test_a_server_that_is_gone_is_sought_for_a_bounded_time(bench):
    trunk = opened(bench.trunk(retry_for_s=0.3))
    with Blocked(bench.federation.server):
        future = trunk.evaluate(where(9), trunk.seal(BOUNDARY.hidden(values(3))))
    get(future)
    bench.federation.server.stop()
    with pytest.raises(TransportError, match=r"Gave up after 0\.3 s"):
        trunk.next_event()


def test_a_server_that_comes_back_with_another_run_is_refused(bench):
    trunk = opened(bench.trunk())
    fed = bench.federation
    fed.server.stop()
    fed.start_server(run=fed.folder / "another-run")
    with pytest.raises(ProtocolError, match="another run"):
        trunk.next_event()


def test_a_client_ahead_of_the_server_is_refused(bench):
    trunk = bench.trunk(Standing(next_step=2, round=1))
    assert trunk.next_event() == Connected()
    with pytest.raises(ProtocolError, match="older than the client's"):
        trunk.next_event()


def test_other_blocks_than_the_plan_gives_are_refused(bench):
    trunk = opened(bench.trunk())
    wrong = replace(where(), blocks=BlockRange(1, 3))
    with pytest.raises(StepInterrupted):
        get(trunk.forward(wrong, trunk.seal(BOUNDARY.hidden(values(0)))))
    with pytest.raises(ProtocolError, match="the plan gives it 1:4"):
        trunk.next_event()


def test_an_observer_may_evaluate_and_fetch_but_opens_no_step(bench):
    trunk = bench.trunk(role="observe")
    assert trunk.next_event() == Connected()
    output = get(trunk.evaluate(where(9), trunk.seal(BOUNDARY.hidden(values(3)))))
    assert torch.equal(output, bench.direct.run(values(3), values(0))[0])
    assert get(trunk.fetch()).tensors.keys() == bench.direct.parameters().keys()
    assert bench.federation.server.service.coordinator.connected == set()


def test_an_observer_that_tries_to_train_is_refused(bench):
    trunk = bench.trunk(role="observe")
    assert trunk.next_event() == Connected()
    trunk.ready(0, 0, 1, 1.0, trunk.seal(BOUNDARY.update({})))
    with pytest.raises(ProtocolError, match="may not send StepReady here"):
        trunk.next_event()


@contextlib.contextmanager
def leaving(bench: Bench, **options: Any) -> Iterator[RemoteTrunk]:
    """A trunk that is left, as whoever observes leaves it."""
    trunk = bench.trunk(**options)
    try:
        yield trunk
    finally:
        trunk.__exit__()


def test_an_observer_that_leaves_says_goodbye_and_its_sessions_end(bench):
    with leaving(bench, role="observe") as trunk:
        for _ in range(2):
            session = trunk.open_session(8)
            session.extend(trunk.seal(BOUNDARY.hidden(values(0)[:1])), (0,), (1,)).result(DEADLINE_S)
        assert bench.federation.server.service.sessions.status()["sessions"] == 2
        assert bench.federation.server.service.status()["using"] == ["a"]
        assert bench.federation.server.service.status()["connected"] == []
    assert not trunk._thread.is_alive()
    assert bench.federation.server.service.status()["using"] == []
    assert bench.federation.server.service.sessions.status()["sessions"] == 0


def test_an_observer_that_leaves_does_not_seek_a_server_that_is_away(bench, proxy, monkeypatch):
    away = threading.Event()

    async def pause_before(*_: object) -> bool:
        away.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(remote_trunk, "pause_before", pause_before)
    with leaving(bench, address=proxy.address, role="observe") as trunk:
        assert trunk.next_event() == Connected()
        session = trunk.open_session(8)
        proxy.refuses = True
        proxy.cut()
        assert away.wait(DEADLINE_S)
    assert not trunk._thread.is_alive()
    with pytest.raises(ProtocolError, match="closed on this side"):
        get(session.extend(trunk.seal(BOUNDARY.hidden(values(0)[:1])), (0,), (1,)))


def test_an_observers_goodbye_that_a_server_does_not_take_is_waited_for_a_bounded_time(bench, monkeypatch):
    monkeypatch.setattr(remote_trunk, "_GOODBYE_S", 0.1)
    monkeypatch.setattr(remote_trunk, "connect", partial(connect, timing=Timing(close_s=0.1)))
    goes_on = threading.Event()
    try:
        with leaving(bench, role="observe") as trunk:
            assert trunk.next_event() == Connected()
            bench.federation.server._loop.call_soon_threadsafe(goes_on.wait, DEADLINE_S)
        assert not trunk._thread.is_alive()
    finally:
        goes_on.set()


def test_a_client_that_agreed_to_another_plan_is_refused(bench, monkeypatch):
    trunk = bench.open(Standing())
    bench.opened.append(trunk)
    opened(trunk)
    other = trunk.invitation.plan.model_copy(update={"seed": 99})
    trunk.invitation = replace(trunk.invitation, plan=other)
    bench.federation.server.stop()
    bench.federation.start_server()
    with pytest.raises((ProtocolError, ConfigError), match="another plan"):
        trunk.next_event()


def test_a_trunk_that_is_not_shared_is_not_handed_out(federation):
    bench = remote_bench(federation("a", **PLAN, durability={"share_trunk": False}))
    try:
        trunk = bench.trunk(role="observe")
        assert trunk.next_event() == Connected()
        future = trunk.fetch()
        with pytest.raises(AuthError, match="does not share"):
            get(future)
    finally:
        bench.close()


def test_a_goodbye_reaches_the_server_although_the_connection_is_lost(federation):
    fed = federation(
        "a", training={"rounds": 1, "steps_per_round": 1, "micro_batch_sequences": 3}, aggregation={"sync": "personal"}
    )
    bench = remote_bench(fed)
    with CuttingProxy(fed.address) as proxy:
        standing = Standing()
        trunk = bench.trunk(address=proxy.address)
        trunk._standing = lambda: standing
        opened(trunk)
        get(trunk.forward(where(), trunk.seal(BOUNDARY.hidden(values(0)))))
        get(trunk.backward(where(), trunk.seal(BOUNDARY.gradient(values(1)))))
        trunk.ready(0, 0, 7, 1.0, trunk.seal(BOUNDARY.update({})))
        assert isinstance(trunk.next_event(), m.StepDone)
        assert trunk.next_event() == m.Finished(1)
        standing = Standing(next_step=1)
        proxy.cut()
        trunk.close(1)
        fed.server.finish()


def test_after_the_trunk_is_lost_for_good_every_question_fails_with_the_reason(bench):
    trunk = opened(bench.trunk(retry_for_s=0.1))
    sealed = trunk.seal(BOUNDARY.hidden(values(0)))
    bench.federation.server.stop()
    with pytest.raises(TransportError):
        trunk.next_event()
    trunk._thread.join(DEADLINE_S)
    with pytest.raises(TransportError, match="Gave up"):
        get(trunk.evaluate(where(9), sealed))
    with pytest.raises(TransportError, match="Gave up"):
        get(trunk.forward(where(), sealed))
    trunk.ready(0, 0, 7, 1.0, trunk.seal(BOUNDARY.update({})))
