"""What the server answers to clients that do not begin as the protocol says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from fedsea.client.invitation import fetch_invitation
from fedsea.errors import ConfigError, FedseaError, ProtocolError, TransportError
from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream, connect
from fedsea.wire.frames import PROTOCOL_VERSION
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import HANDSHAKE
from tests.support.federation import Federation

HELLO = m.Hello(PROTOCOL_VERSION, "0")


@pytest.fixture
def fed(federation) -> Federation:
    made = federation("a")
    made.start_server()
    return made


def talk(fed: Federation, script: Callable[[ClientStream], Awaitable[Any]]) -> Any:
    """Open a stream as client a and follow a script."""

    async def run() -> Any:
        identity = Identity.load(fed.identities / "a")
        async with asyncio.timeout(20), await connect(fed.address, identity, limits=HANDSHAKE) as stream:
            return await script(stream)

    return asyncio.run(run())


def answer_to(*messages: m.Message) -> Callable[[ClientStream], Awaitable[m.Message]]:
    async def script(stream: ClientStream) -> m.Message:
        for message in messages:
            await stream.send(message)
        while isinstance(found := await stream.receive(), m.Welcome):
            pass
        return found

    return script


def join(fed: Federation, **changes: Any) -> m.Join:
    plan = asyncio.run(fetch_invitation(fed.address, Identity.load(fed.identities / "a"))).plan
    return m.Join(**{"plan_sha256": plan.sha256(), "next_step": 0, "prepared_step": -1, "round": 0, **changes})


def test_a_client_that_only_reads_the_plan_leaves_no_trace(fed):
    async def script(stream: ClientStream) -> m.Message:
        await stream.send(HELLO)
        return await stream.receive()

    assert isinstance(talk(fed, script), m.Welcome)
    assert fed.server.service.coordinator.connected == set()


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ((m.FetchTrunk(),), "begins with Hello"),
        ((m.Hello(PROTOCOL_VERSION + 1, "9"),), "speaks protocol"),
        ((HELLO, m.FetchTrunk()), "needs a Join"),
    ],
)
def test_another_beginning_is_refused(fed, messages, sentence):
    with pytest.raises(ProtocolError, match=sentence):
        talk(fed, answer_to(*messages))


def test_another_plan_is_refused(fed):
    with pytest.raises(ConfigError, match="agreed to another plan"):
        talk(fed, answer_to(HELLO, join(fed, plan_sha256="0" * 64)))


def test_an_observer_may_say_goodbye(fed):
    joining = join(fed, role="observe")

    async def script(stream: ClientStream) -> None:
        await stream.send(HELLO)
        await stream.receive()
        await stream.send(joining)
        await stream.send(m.Finished(0))
        with pytest.raises(FedseaError):
            await stream.receive()

    talk(fed, script)


def test_a_failing_client_is_logged_by_its_code_alone(fed, caplog):
    joining = join(fed)

    async def script(stream: ClientStream) -> None:
        for message in (HELLO, joining, m.Failure("NON_FINITE", "secret", 0.0, 0, True)):
            await stream.send(message)
        async for _ in stream:
            pass

    talk(fed, script)
    assert "client a stopped at step 0: NON_FINITE" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_does_not_answer_is_a_retryable_error(fed, monkeypatch):
    async def silent(_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(fed.server.service, "_hello", silent)
    with pytest.raises(TransportError, match=r"did not answer in 0\.5 s"):
        asyncio.run(fetch_invitation(fed.address, Identity.load(fed.identities / "a"), timeout_s=0.5))


def test_a_plan_that_this_side_reads_differently_is_refused(fed, monkeypatch):
    service = fed.server.service
    monkeypatch.setattr(service, "_welcome", replace(service._welcome, plan_sha256="0" * 64))
    with pytest.raises(ProtocolError, match="reads another plan"):
        asyncio.run(fetch_invitation(fed.address, Identity.load(fed.identities / "a")))
