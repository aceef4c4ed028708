"""Client and server ends together, over real mutual TLS on loopback."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fedsea.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    FedseaError,
    ProtocolError,
    SessionLost,
    TransportError,
)
from fedsea.types import Reply
from fedsea.wire import messages as m
from fedsea.wire.arrival import Arrival
from fedsea.wire.channel import ClientStream, call_renew, call_status
from fedsea.wire.encoding import Encoder
from fedsea.wire.errors import PeerClosed
from fedsea.wire.identity import Identity, begin_renewal, finish_renewal
from fedsea.wire.identity.peers import PeerIdentity
from fedsea.wire.limits import HANDSHAKE, MAX_CHUNK_BYTES
from fedsea.wire.server import PeerSession, WireServer, serve
from fedsea.wire.transport import SESSION, Timing
from tests.contract.loopback import CODECS, LIMITS, Federation, echo, forward, join, run, running
from tests.fault.frames import Thrower


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"), "clinic", "bank")


def clinic(federation: Federation) -> Identity:
    return federation.clients["clinic"]


async def flood(stream: ClientStream) -> None:
    """Send more than any buffer on the way can hold."""
    for step in range(50):
        await stream.send(forward(step, 4096))


def test_sixteen_megabytes_cross_in_both_directions_at_once(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (server, address), await join(address, clinic(federation)) as stream:

            async def send() -> None:
                for step in range(4):
                    await stream.send(forward(step, 4096))

            sending = asyncio.create_task(send())
            for step in range(4):
                output = await stream.receive()
                assert isinstance(output, m.Output)
                assert output.step == step
                assert torch.equal(output.tensors[""], torch.full((4096, 1024), float(step)))  # type: ignore[index]
            await sending
            (session,) = server.sessions
            assert session.stats.received == stream.stats.sent
            assert session.stats.sent == stream.stats.received
            assert stream.stats.sent_payload["Forward"] == 4 * 4096 * 1024 * 4

    run(work())


def test_many_sends_at_once_keep_their_order(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), await join(address, clinic(federation)) as stream:
            sending = asyncio.gather(*(stream.send(forward(step, 200)) for step in range(10)))
            outputs = [await stream.receive() for _ in range(10)]
            await sending
            assert [output.step for output in outputs if isinstance(output, m.Output)] == list(range(10))

    run(work())


def test_encoded_messages_can_be_sent_again(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address):
            async with await join(address, clinic(federation)) as stream:
                encoded = await stream.send(forward(3, 10))
                first = await stream.receive()
            async with await join(address, clinic(federation)) as stream:
                await stream.send(encoded)
                second = await stream.receive()
            assert isinstance(first, m.Output)
            assert isinstance(second, m.Output)
            assert torch.equal(first.tensors[""], second.tensors[""])  # type: ignore[index]

    run(work())


def test_status_names_the_caller_from_its_certificate(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address):
            assert await call_status(address, clinic(federation)) == {"you": "clinic"}

    run(work())


def test_a_failing_status_tells_no_details(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with running(federation, status=lambda _: {"x": 1 / 0}) as (_, address):
            with pytest.raises(FedseaError, match="internal error") as caught:
                await call_status(address, clinic(federation))
            assert caught.value.code == "FEDSEA"

    run(work())
    assert "ZeroDivisionError" in caplog.text


def test_a_certificate_is_renewed_over_the_wire(federation: Federation) -> None:
    federation.add("hospital", days_ago=25)
    before = Identity.load(federation.folder / "hospital")

    async def work() -> None:
        async with running(
            federation, renew=lambda _, certificate, csr: federation.authority.renew(certificate, csr).pem
        ) as (_, address):
            pem = await call_renew(address, before, begin_renewal(before))
            after = finish_renewal(before, pem)
            assert after.certificate_pem != before.certificate_pem
            assert federation.gate().check(after.certificate_pem).name == "hospital"

    run(work())


def test_a_client_may_ask_for_one_certificate_in_a_while_and_others_are_not_concerned(federation: Federation) -> None:
    asked: list[str] = []

    def renew(peer: PeerIdentity, *_: bytes) -> bytes:
        asked.append(peer.name)
        return b"certificate"

    async def work() -> None:
        async with running(federation, renew=renew) as (_, address):
            assert await call_renew(address, clinic(federation), b"csr") == b"certificate"
            with pytest.raises(CapacityError, match="one request in 10 s") as caught:
                await call_renew(address, clinic(federation), b"csr")
            assert 0 < caught.value.retry_after_s <= 10
            await call_renew(address, federation.clients["bank"], b"csr")

    run(work())
    assert asked == ["clinic", "bank"]


def test_a_certificate_may_be_asked_for_again_when_the_time_has_passed(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation, renew=lambda *_: b"certificate", timing=Timing(renew_every_s=0.0)) as (
            _,
            address,
        ):
            for _ in range(2):
                assert await call_renew(address, clinic(federation), b"csr") == b"certificate"

    run(work())


def test_a_server_without_renewal_says_so(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address):
            with pytest.raises(ConfigError, match="does not renew"):
                await call_renew(address, clinic(federation), b"csr")

    run(work())


def test_a_replaced_server_certificate_is_shown_to_new_connections(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (server, address):
            other = Federation(federation.folder / "other")
            server.replace_identity(other.server)
            with pytest.raises(AuthError):
                await join(address, clinic(federation))
            server.replace_identity(federation.server)
            await (await join(address, clinic(federation))).close()

    run(work())


def test_a_client_of_another_authority_is_refused(federation: Federation, tmp_path: Path) -> None:
    stranger = Federation(tmp_path, "clinic").clients["clinic"]

    async def work() -> None:
        async with running(federation) as (server, address):
            with pytest.raises(AuthError):
                await join(address, stranger)
            assert server.sessions == ()

    run(work())


@pytest.mark.parametrize("with_tls", [True, False])
def test_a_connection_without_a_certificate_reaches_no_handler(federation: Federation, with_tls: bool) -> None:
    async def work() -> None:
        async def handler(_: PeerSession) -> None:
            raise AssertionError("reached")

        async with running(federation, handler) as (server, address):
            trusted = grpc.ssl_channel_credentials(federation.authority.ca_pem)
            channel = grpc.aio.secure_channel(address, trusted) if with_tls else grpc.aio.insecure_channel(address)
            async with channel:
                call = channel.stream_stream(SESSION)()
                assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert server.sessions == ()

    run(work())


def test_a_revoked_client_is_cut_off_and_stays_out(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "clinic", "bank")

    async def work() -> None:
        async with (
            running(federation) as (server, address),
            await join(address, federation.clients["clinic"]) as revoked,
            await join(address, federation.clients["bank"]) as other,
        ):
            federation.authority.revoke("clinic")
            with pytest.raises(AuthError, match="revoked"):
                await revoked.receive()
            with pytest.raises(AuthError, match="revoked"):
                await join(address, federation.clients["clinic"])
            with pytest.raises(AuthError, match="revoked"):
                await call_status(address, federation.clients["clinic"])
            await other.send(forward(1, 2))
            assert isinstance(await other.receive(), m.Output)
            assert [session.peer.name for session in server.sessions] == ["bank"]

    run(work())


class BrokenGate:
    """Admits once, then cannot answer."""

    def __init__(self, federation: Federation) -> None:
        self._gate = federation.gate()
        self._calls = 0

    def check(self, certificate_pem: bytes) -> object:
        self._calls += 1
        if self._calls > 1:
            raise OSError("the journal's disk is gone")
        return self._gate.check(certificate_pem)


def test_a_gate_that_cannot_answer_lets_nobody_stay(federation: Federation) -> None:
    async def work() -> None:
        async with (
            running(federation, gate=BrokenGate(federation)) as (_, address),
            await join(address, clinic(federation)) as stream,
        ):
            with pytest.raises(AuthError, match="reconnect"):
                await stream.receive()

    run(work())


def test_an_error_of_one_session_leaves_the_others_alone(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with (
            running(federation) as (_, address),
            await join(address, clinic(federation)) as bad,
            await join(address, federation.clients["bank"]) as good,
        ):
            await bad.send(m.FetchTrunk())
            with pytest.raises(FedseaError, match="internal error") as caught:
                await bad.receive()
            assert "private" not in caught.value.message
            await good.send(forward(2, 3))
            assert isinstance(await good.receive(), m.Output)

    run(work())
    assert "private detail" in caplog.text


@pytest.mark.parametrize(
    "error", [ConfigError("Set rounds to 3."), SessionLost("Replay the session."), CapacityError("Full.", 4.5)]
)
def test_an_error_about_the_client_arrives_whole(federation: Federation, error: FedseaError) -> None:
    async def handler(_: PeerSession) -> None:
        raise error

    async def work() -> None:
        async with running(federation, handler) as (_, address):
            with pytest.raises(type(error)) as caught:  # it may be there before the connection counts as open
                async with await join(address, clinic(federation)) as stream:
                    await stream.receive()
            assert caught.value.message == error.message
            assert getattr(caught.value, "retry_after_s", 0.0) == getattr(error, "retry_after_s", 0.0)

    run(work())


def test_fail_ends_the_stream_and_cancels_the_handler(federation: Federation) -> None:
    async def work() -> None:
        cancelled = asyncio.Event()

        async def handler(session: PeerSession) -> None:
            try:
                await session.receive()
                await session.fail(ConfigError("Not with this plan."))
                await session.receive()
            finally:
                cancelled.set()

        async with running(federation, handler) as (_, address):
            async with await join(address, clinic(federation)) as stream:
                await stream.send(m.FetchTrunk())
                with pytest.raises(ConfigError, match="Not with this plan"):
                    await stream.receive()
            await cancelled.wait()

    run(work())


def test_a_fatal_failure_is_raised_at_the_client(federation: Federation) -> None:
    async def handler(session: PeerSession) -> None:
        await session.send(m.Failure("CONFIG", "Recoverable.", 0.0, 1, False))
        await session.send(m.Failure("CONFIG", "The end.", 0.0, 1, True))

    async def work() -> None:
        async with running(federation, handler) as (_, address), await join(address, clinic(federation)) as stream:
            assert isinstance(await stream.receive(), m.Failure)
            with pytest.raises(ConfigError, match=r"The end\."):
                await stream.receive()

    run(work())


def test_a_message_that_breaks_the_protocol_ends_its_stream(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), await join(address, clinic(federation)) as stream:
            with pytest.raises(ProtocolError, match="8192 are allowed"):  # noqa: PT012 (at the send already, or after)
                await stream.send(forward(1, LIMITS.max_tokens + 1))
                await stream.receive()

    run(work())


def test_a_chunk_beyond_the_limit_is_refused_by_grpc(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), Thrower(address, clinic(federation)) as thrower:
            code = await thrower.throw([bytes(MAX_CHUNK_BYTES + 1)])
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await call_status(address, clinic(federation))

    run(work())


def test_the_orderly_end_is_told_to_both_sides(federation: Federation) -> None:
    async def work() -> None:
        seen: list[type[BaseException]] = []
        ended = asyncio.Event()

        async def handler(session: PeerSession) -> None:
            assert isinstance(await session.receive(), m.Finished)
            try:
                await session.receive()
            except PeerClosed:
                seen.append(PeerClosed)
            finally:
                ended.set()

        async with running(federation, handler) as (server, address):
            stream = await join(address, clinic(federation))
            await stream.send(m.Finished(3))
            await stream.close()
            await ended.wait()
            assert seen == [PeerClosed]
            assert server.sessions == ()

    run(work())


def test_the_client_sees_that_the_handler_is_done(federation: Federation) -> None:
    async def handler(session: PeerSession) -> None:
        await session.send(m.Finished(3))

    async def work() -> None:
        async with running(federation, handler) as (_, address), await join(address, clinic(federation)) as stream:
            assert [type(message) async for message in stream] == [m.Finished]
            with pytest.raises(PeerClosed):
                await stream.receive()

    run(work())


def test_a_cancelled_receive_loses_nothing(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), await join(address, clinic(federation)) as stream:
            for _ in range(3):
                receiving = asyncio.create_task(stream.receive())
                await asyncio.wait({receiving}, timeout=0.01)
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)
            await stream.send(forward(7, 500))
            output = await stream.receive()
            assert isinstance(output, m.Output)
            assert output.step == 7

    run(work())


def test_a_cancelled_send_goes_out_whole(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), await join(address, clinic(federation)) as stream:
            sending = asyncio.create_task(stream.send(forward(1, 4096)))
            await asyncio.wait({sending}, timeout=0.001)
            sending.cancel()
            await stream.send(forward(2, 1))
            first, second = await stream.receive(), await stream.receive()
            assert isinstance(first, m.Output)
            assert isinstance(second, m.Output)
            assert (first.step, second.step) == (1, 2)

    run(work())


def test_a_client_that_never_reads_is_dropped(federation: Federation) -> None:
    async def work() -> None:
        ended = asyncio.Event()
        sent: list[int] = []

        async def handler(session: PeerSession) -> None:
            session.encoder = Encoder("server", CODECS)
            output = session.encoder.encode(m.Output(1, 0, 0, False, Reply({"": torch.zeros(4096, 1024)})))
            try:
                for step in range(50):
                    await session.send(output)
                    sent.append(step)
            finally:
                ended.set()

        timing = Timing(check_s=0.05, send_timeout_s=0.3)
        async with running(federation, handler, timing=timing) as (server, address):
            async with await join(address, clinic(federation)) as stream:
                await ended.wait()
                with pytest.raises(TransportError, match="took no data"):
                    async for _ in stream:
                        pass
            assert len(sent) < 4
            assert server.sessions == ()

    run(work())


def test_a_server_that_never_reads_is_given_up(federation: Federation) -> None:
    async def handler(session: PeerSession) -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        async with running(federation, handler, timing=Timing(check_s=0.05, close_s=0.5)) as (_, address):
            timing = Timing(send_timeout_s=0.3, close_s=0.3)
            async with await join(address, clinic(federation), timing=timing) as stream:
                with pytest.raises(TransportError, match="took no data"):
                    await flood(stream)
                with pytest.raises(TransportError, match="took no data"):
                    await stream.receive()
                with pytest.raises(TransportError, match="took no data"):
                    await stream.send(m.FetchTrunk())

    run(work())


def test_a_port_that_never_answers_is_given_up_in_time(federation: Federation) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(TransportError):
                await join(address, clinic(federation), timeout_s=0.3)
            with pytest.raises(TransportError):
                await call_status(address, clinic(federation), timeout_s=0.3)

    run(work(), timeout_s=10.0)


def test_a_status_that_is_none_is_refused(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation, status=lambda _: [1]) as (_, address):
            with pytest.raises(ProtocolError, match="no status"):
                await call_status(address, clinic(federation))

    run(work())


def test_the_servers_last_words_arrive_while_the_client_still_sends(federation: Federation) -> None:
    async def handler(session: PeerSession) -> None:
        await session.send(m.Finished(3))

    async def work() -> None:
        async with (
            running(federation, handler) as (_, address),
            await join(address, clinic(federation)) as stream,
        ):
            with pytest.raises(TransportError):
                await flood(stream)
            assert isinstance(await stream.receive(), m.Finished)

    run(work())


def test_a_vanished_client_ends_its_session(federation: Federation) -> None:
    async def work() -> None:
        ended = asyncio.Event()

        async def handler(session: PeerSession) -> None:
            try:
                async for _ in session:
                    pass
            finally:
                ended.set()

        async with running(federation, handler) as (_, address):
            stream = await join(address, clinic(federation))
            stream._call.cancel()
            await ended.wait()
            await stream.close()

    run(work())


def test_a_client_that_vanishes_while_it_is_sent_to_is_a_broken_connection(federation: Federation) -> None:
    async def work() -> None:
        failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        async def handler(session: PeerSession) -> None:
            transport = session.arrival.transport

            async def send() -> None:
                try:
                    while True:
                        await transport.write(bytes(200_000))
                except Exception as error:
                    failed.set_result(error)

            sending = asyncio.create_task(send())
            try:
                await asyncio.Event().wait()
            finally:
                await sending

        async with running(federation, handler) as (_, address):
            stream = await join(address, clinic(federation))
            assert await stream._read()
            stream._call.cancel()
            assert isinstance(await failed, TransportError)
            await stream.close()

    run(work())


def test_a_stopping_server_asks_to_come_back(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (server, address):
            async with await join(address, clinic(federation)) as stream:
                receiving = asyncio.create_task(stream.receive())
                await server.stop(10.0)
                with pytest.raises(TransportError, match="stopping"):
                    await receiving
            with pytest.raises(TransportError, match="Nothing listens"):
                await join(address, clinic(federation))

    run(work())


def test_a_stream_let_in_while_the_server_stops_is_told_too(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_in = WireServer._let_in

    async def work() -> None:
        told = asyncio.Event()

        async def slowly(server: WireServer, arrival: Arrival, context: Any) -> None:
            await let_in(server, arrival, context)
            await told.wait()

        monkeypatch.setattr(WireServer, "_let_in", slowly)
        async with (
            running(federation) as (server, address),
            await join(address, clinic(federation)) as stream,
        ):
            end_port = server._server.stop

            async def stop(grace_s: float) -> None:
                told.set()  # all streams that there are have been told
                await end_port(grace_s)

            monkeypatch.setattr(server._server, "stop", stop)
            receiving = asyncio.create_task(stream.receive())
            began = time.monotonic()
            await server.stop(20.0)
            with pytest.raises(TransportError, match="stopping"):
                await receiving
            assert time.monotonic() - began < 15.0  # far from the grace: nobody waits for a stream that nobody ends

    run(work())


def test_too_many_streams_of_one_client_are_refused(federation: Federation) -> None:
    async def work() -> None:
        async with running(federation) as (_, address):
            streams = [await join(address, clinic(federation)) for _ in range(4)]
            with pytest.raises(CapacityError, match="too many"):
                await join(address, clinic(federation))
            await (await join(address, federation.clients["bank"])).close()
            for stream in streams:
                await stream.close()

    run(work())


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", "203.0.113.7:0", "no-such-host.invalid:1"])
def test_an_address_that_cannot_be_bound_is_explained(federation: Federation, listen: str) -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match="listen"):
            await serve(listen, federation.server, federation.gate(), echo, status=lambda _: {}, limits=HANDSHAKE)

    run(work())


def test_a_port_in_use_is_named(federation: Federation) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"Port {port}.*in use"):
                await serve(
                    f"127.0.0.1:{port}",
                    federation.server,
                    federation.gate(),
                    echo,
                    status=lambda _: {},
                    limits=HANDSHAKE,
                )

    run(work())


def test_no_session_is_logged_with_values(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with running(federation) as (_, address), await join(address, clinic(federation)) as stream:
            await stream.send(forward(123456, 2))
            await stream.receive()

    with caplog.at_level(logging.DEBUG, logger="fedsea"):
        run(work())
    assert "123456" not in caplog.text
