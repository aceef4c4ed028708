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
from cryptography.hazmat.primitives.serialization import Encoding

from fedsea.errors import AuthError, CapacityError, ConfigError, FedseaError, ProtocolError, TransportError
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel
from fedsea.wire import arrival
from fedsea.wire import messages as m
from fedsea.wire import server as server_module
from fedsea.wire.calls import open_channel
from fedsea.wire.channel import ClientStream, call_renew, call_status
from fedsea.wire.errors import CODE_KEY
from fedsea.wire.identity import Authority, Identity, PeerGate, begin_renewal, certificates, finish_renewal
from fedsea.wire.sealing.keys import SealBroken
from fedsea.wire.sealing.pipe import SealedPipe
from fedsea.wire.server import PeerSession
from fedsea.wire.transport import ADMITTED, DEFAULT_TIMING, RENEW, SESSION, STATUS
from tests.contract.loopback import CODECS, LIMITS, QUICK, Federation, forward, join, run, running
from tests.fault.frames import Thrower
from tests.support.relay import Carried, Cut, Relay, honest, make_relay, relaying

CANARY = "Zebulon Quasimir 0471-993"


class Party(Federation):
    """With a relay."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(folder, *names)
        self.edge = make_relay(folder / "edge", self.authority)


@pytest.fixture
def party(tmp_path: Path) -> Party:
    return Party(tmp_path, "clinic", "bank")


async def answered(stream: ClientStream, step: int) -> None:
    await stream.send(forward(step, 2))
    output = await stream.receive()
    assert isinstance(output, m.Output)
    assert output.step == step


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


# --- who is behind a relay --------------------------------------------------------------------------------------------


def test_a_client_that_is_revoked_behind_a_relay_is_cut_off_and_told_so_alone(party: Party) -> None:
    async def work() -> None:
        async with running(party) as (server, address), relaying(party.edge, address) as relay:
            async with (
                await join(relay.address, party.clients["clinic"]) as revoked,
                await join(relay.address, party.clients["bank"]) as other,
            ):
                party.authority.revoke("clinic")
                with pytest.raises(AuthError, match="The certificate of clinic was revoked"):
                    await revoked.receive()
                with pytest.raises(AuthError, match="The certificate of clinic was revoked"):
                    await join(relay.address, party.clients["clinic"])
                await answered(other, 1)
                assert [session.peer.name for session in server.sessions] == ["bank"]
            assert b"revoked" not in relay.seen

    run(work())


def test_a_relay_that_is_revoked_carries_nothing_more(party: Party) -> None:
    async def work() -> None:
        async with (
            running(party) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, party.clients["clinic"]) as through,
            await join(address, party.clients["bank"]) as direct,
        ):
            party.authority.revoke("edge")
            with pytest.raises(AuthError, match="The certificate of edge was revoked"):
                await through.receive()
            with pytest.raises(AuthError, match="not confirmed"):
                await join(relay.address, party.clients["clinic"])
            await answered(direct, 1)

    run(work())


def test_only_clients_on_the_list_come_in_and_only_so_many_streams(party: Party) -> None:
    async def work() -> None:
        gate = PeerGate(party.folder / "ca", ["clinic"])
        async with running(party, gate=gate) as (_, address), relaying(party.edge, address) as relay:
            with pytest.raises(AuthError, match="bank is not on the server's list"):
                await join(relay.address, party.clients["bank"])
            streams = [await join(relay.address, party.clients["clinic"]) for _ in range(4)]
            with pytest.raises(CapacityError, match="too many open streams"):
                await join(relay.address, party.clients["clinic"])
            for stream in streams:
                await stream.close()

    run(work())


def test_a_certificate_that_runs_out_behind_a_relay_is_refused(party: Party) -> None:
    async def work() -> None:
        old = party.add("old", days_ago=29.9999)
        gate = party.gate()
        async with (
            running(party, gate=gate) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, old) as stream,
        ):
            gate._clock = lambda: old.not_after.replace(year=old.not_after.year + 1)
            with pytest.raises(AuthError, match="expired"):
                await stream.receive()

    run(work())


def test_status_and_renewal_go_sealed_through_a_relay(party: Party) -> None:
    authority = Authority.open(party.folder / "ca")
    old = party.add("old", days_ago=20)

    def renew(_: object, certificate_pem: bytes, request: bytes) -> bytes:
        return authority.renew(certificate_pem, request).pem

    async def work() -> Identity:
        status = lambda peer: {"you": peer.name, "secret": CANARY}  # noqa: E731
        async with running(party, status=status, renew=renew) as (_, address), relaying(party.edge, address) as relay:
            assert await call_status(relay.address, party.clients["bank"]) == {"you": "bank", "secret": CANARY}
            request = begin_renewal(old)
            answer = await call_renew(relay.address, old, request)
            with pytest.raises(AuthError, match="not renewed now"):
                await call_renew(relay.address, party.clients["bank"], begin_renewal(party.clients["bank"]))
            for secret in (CANARY.encode(), b"REQUEST", b"BEGIN", b"not renewed"):
                assert secret not in relay.seen
        return finish_renewal(old, answer)

    renewed: list[Identity] = []

    async def all_of_it() -> None:
        renewed.append(await work())

    run(all_of_it())
    assert renewed[0].not_after > old.not_after


def test_a_client_that_does_not_finish_the_handshake_is_cut_off(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "HANDSHAKE_S", 0.2)

    async def work() -> None:
        async with running(party) as (server, address):
            channel = open_channel(address, party.edge, DEFAULT_TIMING)
            call = channel.stream_stream(SESSION)()
            with pytest.raises(grpc.aio.AioRpcError, match="handshake was not done"):
                await call.read()
            assert not server.sessions
            await channel.close()

    run(work())


def test_a_relay_with_many_unfinished_handshakes_is_held_off(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_HANDSHAKES_OF_A_PEER", 2)

    async def work() -> None:
        async with running(party) as (_, address), relaying(party.edge, address) as relay:
            channel = open_channel(address, party.edge, DEFAULT_TIMING)
            calls = [channel.stream_stream(SESSION)() for _ in range(2)]
            for call in calls:
                await call.initial_metadata()
            with pytest.raises(CapacityError, match="too many handshakes"):
                await join(relay.address, party.clients["clinic"])
            async with await join(address, party.clients["bank"]) as direct:
                await answered(direct, 0)
            for call in calls:
                await call.done_writing()
                with pytest.raises(grpc.aio.AioRpcError):
                    await call.read()
            async with await join(relay.address, party.clients["clinic"]) as stream:
                await answered(stream, 1)
            await channel.close()

    run(work())


def test_a_server_whose_certificate_was_replaced_makes_handshakes_with_the_new_one(party: Party) -> None:
    async def work() -> None:
        async with running(party) as (server, address), relaying(party.edge, address) as relay:
            async with await join(relay.address, party.clients["clinic"]) as before:
                new = Identity.load(party.authority.issue_server(["127.0.0.1"], folder=party.folder / "server"))
                assert new.serial != party.server.serial
                server.replace_identity(new)
                await answered(before, 0)
                async with await join(relay.address, party.clients["bank"]) as after:
                    await answered(after, 0)
            shown = certificates.certificate_from_pem(new.certificate_pem, "it").public_bytes(Encoding.DER)
            assert [shown in call.down[0] for call in relay.carried] == [False, True]

    run(work())


# --- without a relay --------------------------------------------------------------------------------------------------


def test_direct_streams_are_sealed_when_the_server_says_so(party: Party) -> None:
    async def work() -> None:
        async with running(party, sealed=True) as (_, address):
            async with await join(address, party.clients["clinic"]) as stream:
                assert stream.sealed
                await answered(stream, 1)
            assert await call_status(address, party.clients["clinic"]) == {"you": "clinic"}
            async with Thrower(address, party.clients["clinic"]) as thrower:
                assert await thrower.throw([b"FSEA" + bytes(60)]) is grpc.StatusCode.INVALID_ARGUMENT

    run(work())


def test_a_client_cannot_carry_another_clients_stream(party: Party) -> None:
    """Only a relay may bring what is not its own, for only a relay was approved for that."""

    async def work() -> None:
        async with running(party, sealed=True) as (server, address):
            bank = Relay(party.edge, address)
            await bank.start()
            bank._identity = party.clients["bank"]  # towards the server it shows bank's certificate
            with pytest.raises(AuthError, match="bank brought a stream of another client"):
                await join(bank.address, party.clients["clinic"])
            assert not server.sessions
            await bank.stop()

    run(work())


def test_large_messages_go_through_whole_in_both_directions_at_once(party: Party) -> None:
    async def work() -> None:
        async with (
            running(party) as (_, address),
            relaying(party.edge, address) as relay,
            await join(relay.address, party.clients["clinic"]) as stream,
        ):
            sending = asyncio.gather(*(stream.send(forward(step, 900)) for step in range(4)))
            for step in range(4):
                output = await stream.receive()
                assert isinstance(output, m.Output)
                assert torch.equal(output.tensors[""], torch.full((900, 1024), float(step)))  # type: ignore[index]
            await sending
            assert stream.stats.sent_bytes == stream.stats.sent["Forward"] > 4 * 900 * 4096
            assert stream.encoder.codecs == CODECS
            assert set(CODECS) == {Channel.HIDDEN, Channel.GRADIENT}

    run(work())
