"""A relay where TLS ends can neither read, alter, replay nor cut unnoticed, and cannot talk its way around that."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch

from fedsea.errors import AuthError, ConfigError, FedseaError, ProtocolError, TransportError
from fedsea.privacy.boundary import Boundary
from fedsea.wire import messages as m
from fedsea.wire.calls import open_channel
from fedsea.wire.channel import ClientStream
from fedsea.wire.errors import CODE_KEY
from fedsea.wire.sealing.keys import SealBroken
from fedsea.wire.sealing.pipe import SealedPipe
from fedsea.wire.server import PeerSession
from fedsea.wire.transport import ADMITTED, DEFAULT_TIMING, RENEW, SESSION, STATUS
from tests.contract.loopback import LIMITS, QUICK, forward, join, run, running
from tests.contract.relays import CANARY, Party, answered
from tests.fault.frames import Thrower
from tests.support.relay import Carried, Cut, Relay, honest, relaying


@pytest.fixture
def party(tmp_path: Path) -> Party:
    return Party(tmp_path, "clinic", "bank")


def test_a_relay_reads_nothing_of_what_it_carries(party: Party) -> None:
    async def handler(session: PeerSession) -> None:
        await session.send(m.Welcome(json.dumps({"plan": CANARY}), "0" * 64, "0" * 16))
        session.limits = LIMITS
        async for message in session:
            assert isinstance(message, m.Forward)
            assert message.tensors[""].view(-1).view(torch.uint8).numpy().tobytes() == values  # type: ignore[index]
            raise ConfigError(f"The plan of {CANARY} has an error.")

    values = (CANARY * 4096).encode()[: 4 * 1024 * 3]

    async def work() -> None:
        tensor_TH = torch.frombuffer(bytearray(values), dtype=torch.float32).view(3, 1024)
        async with running(party, handler) as (_, address), relaying(party.edge, address) as relay:
            async with await join(relay.address, party.clients["clinic"]) as stream:
                assert stream.sealed
                welcome = await stream.receive()
                assert isinstance(welcome, m.Welcome)
                assert CANARY in welcome.plan_json
                message = dataclasses.replace(forward(1, 3), tensors=Boundary("trusted-server").hidden(tensor_TH))
                await stream.send(message)
                with pytest.raises(ConfigError, match=CANARY):
                    await stream.receive()
            assert len(relay.seen) > len(values)
            for secret in (CANARY.encode(), b"FSEA", b"plan", b"CONFIG", values[:64]):
                assert secret not in relay.seen

    run(work())


# --- what a relay may try ---------------------------------------------------------------------------------------------

AT = 3
"""The chunk that is meddled with; before it come two of the handshake and one message."""


def alter(_: Carried, number: int, chunk: bytes) -> list[bytes]:
    return [chunk[:40] + bytes([chunk[40] ^ 1]) + chunk[41:]] if number == AT else [chunk]


def truncate(_: Carried, number: int, chunk: bytes) -> list[bytes]:
    return [chunk[:-1]] if number == AT else [chunk]


def replay(call: Carried, number: int, chunk: bytes) -> list[bytes]:
    return [chunk, chunk] if number == AT else [chunk]


def drop(_: Carried, number: int, chunk: bytes) -> list[bytes]:
    return [] if number == AT else [chunk]


class Reorder:
    """Holds one back until the next has gone."""

    held = b""

    def __call__(self, _: Carried, number: int, chunk: bytes) -> list[bytes]:
        if number == AT:
            self.held = chunk
            return []
        return [chunk, self.held] if number == AT + 1 else [chunk]


def cut(_: Carried, number: int, chunk: bytes) -> list[bytes]:
    if number == AT:
        raise Cut
    return [chunk]


TRICKS: dict[str, tuple[Callable[[], Callable[[Carried, int, bytes], list[bytes]]], str]] = {
    "alter": (lambda: alter, "altered"),
    "truncate": (lambda: truncate, "altered"),
    "replay": (lambda: replay, "came twice"),
    "drop": (lambda: drop, "missing or came too late"),
    "reorder": (Reorder, "missing or came too late"),
    "cut": (lambda: cut, r"was cut|without a word"),
}


async def meddled(stream: ClientStream, trick: str) -> FedseaError:
    """Say something, then what is meddled with; what went wrong.

    Nothing is written any more when the end may come: gRPC forgets a status that meets a write, as without a relay.
    """
    await answered(stream, 0)
    for step in range(1, 3 if trick in ("drop", "reorder") else 2):
        await stream.send(forward(step, 2))
    try:
        while True:
            await stream.receive()
    except FedseaError as error:
        return error


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("trick", TRICKS)
def test_every_trick_ends_that_stream_alone_and_reconnecting_helps(party: Party, trick: str, up: bool) -> None:
    make, words = TRICKS[trick]

    async def work() -> None:
        async with (
            running(party) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, party.clients["bank"]) as other,
        ):
            await answered(other, 0)
            does, others = make(), relay.carried[0]

            def meddle(call: Carried, upwards: bool, number: int, chunk: bytes) -> list[bytes]:
                return does(call, number, chunk) if call is not others and upwards is up else [chunk]

            relay.meddle = meddle
            async with await join(relay.address, party.clients["clinic"]) as stream:
                error = await meddled(stream, trick)
            with pytest.raises(TransportError, match=words):
                raise error
            assert error.retryable
            await answered(other, 1)
            relay.meddle = honest
            async with await join(relay.address, party.clients["clinic"]) as stream:
                await answered(stream, 2)

    run(work())


@pytest.mark.parametrize("what", ["of the other direction", "of another client", "of an earlier stream"])
def test_what_was_sealed_for_another_stream_opens_in_none(party: Party, what: str) -> None:
    async def work() -> None:
        async with running(party) as (_, address), relaying(party.edge, address) as relay:
            async with await join(relay.address, party.clients["clinic"]) as earlier:
                await answered(earlier, 0)
            async with await join(relay.address, party.clients["bank"]) as bank:
                await answered(bank, 0)
                before, others = relay.carried[0], relay.carried[1]

                def meddle(call: Carried, up: bool, number: int, chunk: bytes) -> list[bytes]:
                    if call in (before, others) or number != 2 or up:
                        return [chunk]
                    source = {"of the other direction": call.up, "of another client": others.down}
                    return [source.get(what, before.down)[2]]

                relay.meddle = meddle
                async with await join(relay.address, party.clients["clinic"]) as stream:
                    with pytest.raises(SealBroken, match="does not belong to this stream"):
                        await answered(stream, 0)
                await answered(bank, 1)

    run(work())


def test_a_recorded_stream_played_to_the_server_again_is_refused(party: Party) -> None:
    async def work() -> None:
        async with running(party) as (server, address), relaying(party.edge, address) as relay:
            async with await join(relay.address, party.clients["clinic"]) as stream:
                await answered(stream, 0)
            recorded = list(relay.carried[0].up)
            channel = open_channel(address, party.edge, DEFAULT_TIMING)
            call = channel.stream_stream(SESSION)()
            for chunk in recorded:
                await call.write(chunk)
            await call.read()  # the server's new answer, which the recorded proof is not for
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert dict(caught.value.trailing_metadata())[CODE_KEY] == "AUTH"
            assert "not made for this connection" in caught.value.details()
            assert not server.sessions
            await channel.close()

    run(work())


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_last_record_that_is_held_back_is_noticed_when_nothing_follows(party: Party, up: bool) -> None:
    timing = dataclasses.replace(QUICK, alive_s=0.1)

    async def work() -> None:
        async with running(party, timing=timing) as (_, address), relaying(party.edge, address) as relay:
            held: list[bytes] = []

            def meddle(_: Carried, upwards: bool, number: int, chunk: bytes) -> list[bytes]:
                if upwards is up and number >= 2 and not held:
                    held.append(chunk)
                    return []
                return [chunk]

            async with await join(relay.address, party.clients["clinic"], timing=timing) as stream:
                relay.meddle = meddle
                await stream.send(forward(0, 2))
                with pytest.raises(TransportError, match=r"is missing or came too late|without a word"):
                    await stream.receive()

    run(work())


@pytest.mark.parametrize("deaf", ["client", "server"])
def test_an_end_that_is_cut_off_behind_a_living_relay_is_noticed(party: Party, deaf: str) -> None:
    impatient = dataclasses.replace(QUICK, silence_s=0.4)

    async def work() -> None:
        theirs, ours = (QUICK, impatient) if deaf == "client" else (impatient, QUICK)
        async with (
            running(party, timing=theirs) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, party.clients["clinic"], timing=ours) as stream,
        ):
            relay.meddle = lambda _call, up, _number, chunk: [] if up is (deaf == "server") else [chunk]
            with pytest.raises(TransportError, match="Nothing came from the other end"):
                await stream.receive()

    run(work())


def test_an_idle_stream_behind_a_relay_lives_on(party: Party) -> None:
    timing = dataclasses.replace(QUICK, alive_s=0.02, silence_s=5.0)

    async def work() -> None:
        async with (
            running(party, timing=timing) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, party.clients["clinic"], timing=timing) as stream,
        ):
            await answered(stream, 0)
            call = relay.carried[0]
            while min(len(call.up), len(call.down)) < 8:
                await asyncio.wait_for(relay.passed.wait(), 10.0)
                relay.passed.clear()
            await answered(stream, 1)

    run(work())


def test_keys_that_have_grown_old_end_a_live_stream_and_reconnecting_helps(party: Party) -> None:
    async def work() -> None:
        async with running(party) as (server, address), relaying(party.edge, address) as relay:
            async with await join(relay.address, party.clients["clinic"]) as stream:
                await answered(stream, 0)
                pipe = server.sessions[0].arrival.transport
                assert isinstance(pipe, SealedPipe)
                pipe.keys.opener._old_at = 0.0
                with pytest.raises(TransportError, match="24 hours old: reconnect"):
                    await answered(stream, 1)
            async with await join(relay.address, party.clients["clinic"]) as stream:
                await answered(stream, 2)

    run(work())


# --- what a relay may say ---------------------------------------------------------------------------------------------


def test_a_relays_own_words_never_count_as_the_servers(party: Party) -> None:
    forged = (grpc.StatusCode.UNAUTHENTICATED, "You were revoked.", ((CODE_KEY, "AUTH"),))

    async def work() -> None:
        async with running(party) as (_, address), relaying(party.edge, address) as relay:

            def meddle(_: Carried, up: bool, number: int, chunk: bytes) -> list[bytes]:
                if not up and number == 2:
                    raise Cut(forged)
                return [chunk]

            relay.meddle = meddle
            async with await join(relay.address, party.clients["clinic"]) as stream:
                with pytest.raises(SealBroken, match="without a word from the server"):
                    await answered(stream, 0)
            relay.forged = forged
            with pytest.raises(
                AuthError, match=r"The relay says, and the server has not confirmed .* You were revoked"
            ):
                await join(relay.address, party.clients["clinic"])

    run(work())


class Rogue(Relay):
    """Speaks the protocol itself, unsealed, in the hope that the client does not mind."""

    async def _carry(self, method: str, context: object) -> None:
        await context.send_initial_metadata(((ADMITTED, ""),))  # type: ignore[attr-defined]
        self.carried.append(Carried(up=[await context.read()]))  # type: ignore[attr-defined]
        await context.write(b"FSEA" + bytes(60))  # type: ignore[attr-defined]


def test_a_relay_cannot_talk_a_client_out_of_sealing(party: Party) -> None:
    async def work() -> None:
        rogue = Rogue(party.edge, "")
        await rogue.start()
        with pytest.raises(ProtocolError, match="has to be sealed"):
            await join(rogue.address, party.clients["clinic"])
        assert rogue.carried[0].up[0].startswith(b"FSEL")
        # Nor can it stand where a client expects the server itself.
        with pytest.raises(AuthError, match="if TLS ends at a relay there"):
            await join(rogue.address.removeprefix("relay://"), party.clients["clinic"])
        await rogue.stop()
        assert len(rogue.carried) == 1

    run(work())


def test_a_relay_cannot_be_the_server(party: Party) -> None:
    """It runs fedsea's own server under its own identity, sealing included."""

    async def work() -> None:
        real, party.server = party.server, party.edge
        async with running(party, sealed=True) as (_, address):
            party.server = real
            with pytest.raises(AuthError, match="posing as it"):
                await join(f"relay://{address}", party.clients["clinic"])

    run(work())


def test_what_a_relay_asks_itself_is_refused(party: Party) -> None:
    async def work() -> None:
        async with running(party, renew=lambda *_: b"") as (server, address):
            for method in (STATUS, RENEW):
                channel = open_channel(address, party.edge, DEFAULT_TIMING)
                with pytest.raises(grpc.aio.AioRpcError, match="A relay passes sealed streams on"):
                    await channel.unary_unary(method)(b"")
                await channel.close()
            async with Thrower(address, party.edge) as thrower:
                assert await thrower.throw([b"FSEA" + bytes(60)]) is grpc.StatusCode.INVALID_ARGUMENT
            async with relaying(party.edge, address) as relay:
                with pytest.raises(AuthError, match="takes no part itself"):
                    await join(relay.address, party.edge)
            assert not server.sessions

    run(work())
