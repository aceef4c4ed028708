"""The server's end: a port that admits known clients only, and one `PeerSession` for each of their streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc

from fedsea.errors import AuthError, CapacityError, ConfigError, FedseaError, ProtocolError, TransportError
from fedsea.wire.arrival import Arrival, Gate, abort
from fedsea.wire.buffers import BufferPool
from fedsea.wire.calls import TlsIdentity
from fedsea.wire.identity.peers import PeerIdentity, PeerRefused
from fedsea.wire.limits import WireLimits
from fedsea.wire.listening import check_listen
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import Subject
from fedsea.wire.session import PeerSession
from fedsea.wire.transport import ADMITTED, DEFAULT_TIMING, SEALED, SERVICE, Timing, aio, server_options

__all__ = ["PeerSession", "WireServer", "check_listen", "serve"]

log = logging.getLogger(__name__)

_MAX_CALLS = 4096
_MAX_SESSIONS_OF_A_PEER = 4
_MAX_HANDSHAKES_OF_A_PEER = 64
_LARGEST_REQUEST = 64 << 10


Handler = Callable[[PeerSession], Awaitable[None]]
Renew = Callable[[PeerIdentity, bytes, bytes], bytes]
"""Gets the peer, its present certificate and its request; returns the new certificate. Runs in a thread."""
Refused = Callable[[str, str], None]
"""Gets the name of a client that the gate does not admit, or not any more, and the reason in a word or two."""


class WireServer:
    """A running server; made by `serve`.

    Attributes:
        port: Where it listens.
    """

    def __init__(
        self,
        gate: Gate,
        handler: Handler,
        status: Callable[[PeerIdentity], dict[str, Any]],
        renew: Renew | None,
        refused: Refused | None,
        limits: WireLimits,
        timing: Timing,
        sealed: bool,
    ) -> None:
        self.port = 0
        self._gate = gate
        self._handler = handler
        self._status = status
        self._renew = renew
        self._refused = refused
        self._limits = limits
        self._timing = timing
        self._sealed = sealed
        self._pool = BufferPool()
        self._sessions: set[PeerSession] = set()
        self._entering: Counter[str] = Counter()  # streams that are let in just now, by whose they are; peers are few
        self._handshakes: Counter[str] = Counter()  # by who brings the stream; likewise
        self._renewed_at: dict[str, float] = {}  # names are those that the gate lets in
        self._server: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False
        self._certificates: Any = None
        self._me: SealingIdentity | None = None

    @property
    def sessions(self) -> tuple[PeerSession, ...]:
        """Live streams."""
        return tuple(self._sessions)

    async def start(self, listen: str, identity: TlsIdentity) -> None:
        """Bind and serve; see `serve`."""
        check_listen(listen)
        self.replace_identity(identity)
        self._server = aio.server(options=server_options(self._timing), maximum_concurrent_rpcs=_MAX_CALLS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        credentials = grpc.dynamic_ssl_server_credentials(
            self._certificates, lambda: self._certificates, require_client_authentication=True
        )
        try:
            self.port = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ConfigError(f"{listen} cannot be listened on: give another address or port with --listen.")
        await self._server.start()
        self._watch = asyncio.create_task(self._watch_peers())

    def replace_identity(self, identity: TlsIdentity) -> None:
        """Show this certificate to whoever connects from now on."""
        self._me = SealingIdentity.of(identity)
        self._certificates = grpc.ssl_server_certificate_configuration(
            [(identity.key_pem, identity.certificate_pem)], root_certificates=identity.ca_pem
        )

    async def stop(self, grace_s: float = 5.0) -> None:
        """End all streams with a retryable error, and the port."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for session in self.sessions:
            session.end(_stopping())
        await self._server.stop(grace_s)

    def _handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Session": grpc.stream_stream_rpc_method_handler(self._serve_session),
                "Status": grpc.unary_unary_rpc_method_handler(self._serve_status),
                "Renew": grpc.unary_unary_rpc_method_handler(self._serve_renew),
            },
        )

    async def _serve_session(self, _: Any, context: Any) -> None:
        arrival: Arrival | None = None
        error: BaseException | None
        try:
            arrival = Arrival(self._gate, context)
            if self._stopping:
                raise _stopping()
            await self._let_in(arrival, context)
            error = await self._serve(arrival)
            if error is None:
                await arrival.end()
        except PeerRefused as raised:
            self._note(raised)
            error = raised
        except Exception as raised:  # noqa: BLE001 (everything becomes a status; `status_of` logs what it hides)
            error = raised
        if error is not None:
            await (abort(context, error) if arrival is None else arrival.abort(error))

    async def _let_in(self, arrival: Arrival, context: Any) -> None:
        if not self._sealed and arrival.relay_pem is None:
            with self._room(arrival):
                await context.send_initial_metadata(((ADMITTED, ""),))
            return
        bringer = arrival.peer.name
        if self._handshakes[bringer] >= _MAX_HANDSHAKES_OF_A_PEER:
            raise CapacityError(f"{bringer} has too many handshakes under way; try again.", retry_after_s=1.0)
        await context.send_initial_metadata(((ADMITTED, ""), (SEALED, "")))
        assert self._me is not None
        self._handshakes[bringer] += 1
        try:
            await arrival.seal(self._me)
            with self._room(arrival):
                await arrival.open()
        finally:
            self._handshakes[bringer] -= 1

    @contextlib.contextmanager
    def _room(self, arrival: Arrival) -> Iterator[None]:
        """Room for one more stream, kept while it is let in: afterwards its session counts, before anything else runs.

        Raises:
            CapacityError: There is none.
        """
        peer = arrival.peer
        num_open = sum(session.peer.name == peer.name for session in self._sessions)
        if num_open + self._entering[peer.name] >= _MAX_SESSIONS_OF_A_PEER:
            raise CapacityError(f"{peer.name} has too many open streams; close some.", retry_after_s=10.0)
        num_new = int(arrival.subject is Subject.SESSION)
        self._entering[peer.name] += num_new
        try:
            yield
        finally:
            self._entering[peer.name] -= num_new

    async def _serve(self, arrival: Arrival) -> BaseException | None:
        if arrival.subject is not Subject.SESSION:
            await self._answer_sealed(arrival)
            return None
        session = PeerSession(arrival, self._limits, self._pool, self._timing)
        self._sessions.add(session)
        if self._stopping:  # begun while this stream was let in
            session.end(_stopping())
        arrival.keep(self._timing)
        try:
            return await session.run(self._handler, self._timing.close_s)
        finally:
            self._sessions.discard(session)
            await arrival.release()

    async def _answer_sealed(self, arrival: Arrival) -> None:
        """Status or renewal over a sealed stream: one question, one answer."""
        async with asyncio.timeout(self._timing.close_s):
            if arrival.subject is Subject.STATUS:
                answer = json.dumps(self._status(arrival.peer)).encode()
            else:
                request = await arrival.transport.read() or b""
                answer = await self._renewed(arrival.peer, arrival.certificate_pem, request)
            await arrival.transport.write(answer)

    async def _serve_status(self, _: bytes, context: Any) -> bytes:
        try:
            peer, _pem = Arrival(self._gate, context).client()
            return json.dumps(self._status(peer)).encode()
        except Exception as error:
            await abort(context, error)
            raise

    async def _serve_renew(self, request: bytes, context: Any) -> bytes:
        try:
            return await self._renewed(*Arrival(self._gate, context).client(), request)
        except Exception as error:
            await abort(context, error)
            raise

    async def _renewed(self, peer: PeerIdentity, certificate_pem: bytes, request: bytes) -> bytes:
        if self._renew is None:
            raise ConfigError("This server does not renew certificates: ask its operator for a new one.")
        if len(request) > _LARGEST_REQUEST:
            raise ProtocolError("The request for a certificate is too large.")
        self._bound_renewals(peer.name)
        return await asyncio.to_thread(self._renew, peer, certificate_pem, request)

    def _bound_renewals(self, name: str) -> None:
        now, every_s = time.monotonic(), self._timing.renew_every_s
        wait_s = self._renewed_at.get(name, -math.inf) + every_s - now
        if wait_s > 0:
            raise CapacityError(
                f"{name} has just asked for a new certificate: one request in {every_s:g} s is answered. Try again in "
                f"{math.ceil(wait_s)} s.",
                retry_after_s=wait_s,
            )
        self._renewed_at[name] = now

    async def _watch_peers(self) -> None:
        """Ask the gate again and again, so that revoked and expired peers leave within seconds."""
        while True:
            await asyncio.sleep(self._timing.check_s)
            for session in self.sessions:
                if session.ended:
                    continue
                try:
                    session.arrival.check_again()
                except FedseaError as error:
                    log.warning("the stream of client %s is ended: %s", session.peer.name, error.message)
                    session.end(error)
                    self._note(error)
                except Exception:
                    log.exception("the gate could not check %s; its stream is ended", session.peer.name)
                    session.end(AuthError("The server could not check this certificate again; reconnect."))

    def _note(self, error: FedseaError) -> None:
        """Tell who is refused, unless the same client is here with another certificate."""
        if self._refused is None or not isinstance(error, PeerRefused):
            return
        if not any(session.peer.name == error.name and not session.ended for session in self._sessions):
            self._refused(error.name, error.reason)


def _stopping() -> TransportError:
    return TransportError("The server is stopping; reconnect when it is back.")


async def serve(
    listen: str,
    identity: TlsIdentity,
    gate: Gate,
    handler: Handler,
    *,
    status: Callable[[PeerIdentity], dict[str, Any]],
    renew: Renew | None = None,
    refused: Refused | None = None,
    limits: WireLimits,
    timing: Timing = DEFAULT_TIMING,
    sealed: bool = False,
) -> WireServer:
    """Listen for clients, with mutual TLS.

    Args:
        listen: `HOST:PORT`; port 0 takes a free one.
        identity: The server's.
        gate: Decides on every new stream and call, and again every `timing.check_s` on live streams.
        handler: Runs once a stream. When it returns the stream ends well; when it raises, the client gets the error
            (in full if it is about the client, else a generic sentence).
        status: Answers `call_status`.
        renew: Answers `call_renew`; None refuses.
        refused: Told of clients that the gate turns away or cuts off.
        limits: Of new sessions: usually `limits.HANDSHAKE`.
        timing: Deadlines.
        sealed: Seal the streams of clients that connect directly, too; those that a relay brings always are.

    Raises:
        ConfigError: The address is none, is in use, or is not of this machine.
    """
    server = WireServer(gate, handler, status, renew, refused, limits, timing, sealed)
    await server.start(listen, identity)
    return server
