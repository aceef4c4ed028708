"""Who is behind a relay: revoked, expired and unlisted clients; status and renewal; and direct sealed streams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding

from fedsea.errors import AuthError, CapacityError, TransportError
from fedsea.types import Channel
from fedsea.wire import arrival
from fedsea.wire import messages as m
from fedsea.wire import server as server_module
from fedsea.wire.calls import open_channel
from fedsea.wire.channel import call_renew, call_status
from fedsea.wire.identity import Authority, Identity, PeerGate, begin_renewal, certificates, finish_renewal
from fedsea.wire.transport import DEFAULT_TIMING, SESSION
from tests.contract.loopback import CODECS, forward, join, run, running
from tests.contract.relays import CANARY, Party, answered
from tests.fault.frames import Thrower
from tests.support.relay import Relay, relaying


@pytest.fixture
def party(tmp_path: Path) -> Party:
    return Party(tmp_path, "clinic", "bank")


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
            with pytest.raises(AuthError, match=r"certificate of the relay edge was revoked, .* its owner has to ask"):
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


def test_clients_that_do_not_take_the_servers_word_are_bounded_and_given_up(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_MAX_HANDSHAKES_OF_A_PEER", 2)
    patient, deaf = asyncio.Event(), 0

    async def not_taken(_: object) -> None:
        nonlocal deaf
        deaf += 1
        if deaf == 2:
            patient.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with running(party) as (_, address), relaying(party.edge, address) as relay:
            with monkeypatch.context() as patched:
                patched.setattr(arrival, "tell_ready", not_taken)
                waiting = [asyncio.create_task(join(relay.address, party.clients["clinic"])) for _ in range(2)]
                await patient.wait()
                with pytest.raises(CapacityError, match="too many handshakes"):
                    await join(relay.address, party.clients["bank"])
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                patched.setattr(arrival, "HANDSHAKE_S", 0.5)
                with pytest.raises(TransportError, match="took no data"):
                    await join(relay.address, party.clients["bank"])

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


def test_streams_that_are_let_in_at_once_count_before_they_are(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, tell_ready = asyncio.Event(), arrival.tell_ready

    async def told_later(pipe: Any) -> None:
        await ready.wait()
        await tell_ready(pipe)

    async def work() -> None:
        monkeypatch.setattr(arrival, "tell_ready", told_later)
        async with running(party, sealed=True) as (server, address):
            joining = [asyncio.create_task(join(address, party.clients["clinic"])) for _ in range(5)]
            (refused,), _ = await asyncio.wait(joining, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(CapacityError, match="too many open streams"):
                await refused
            ready.set()
            streams = [await task for task in joining if task is not refused]
            with pytest.raises(CapacityError, match="too many open streams"):
                await join(address, party.clients["clinic"])
            assert len(server.sessions) == 4
            for stream in streams:
                await stream.close()
            await (await join(address, party.clients["clinic"])).close()

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
