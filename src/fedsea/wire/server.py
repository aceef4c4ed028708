"""The server's end: a port that admits known clients only, and one `PeerSession` for each of their streams."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from fedsea.errors import AuthError, CapacityError, ConfigError, FedseaError, ProtocolError, TransportError
from fedsea.wire.buffers import BufferPool
from fedsea.wire.calls import TlsIdentity
from fedsea.wire.errors import status_of
from fedsea.wire.identity.peers import PeerIdentity, PeerRefused
from fedsea.wire.limits import WireLimits
from fedsea.wire.session import PeerSession
from fedsea.wire.transport import ADMITTED, DEFAULT_TIMING, SERVICE, Timing, aio, server_options

log = logging.getLogger(__name__)

_MAX_CALLS = 4096
_MAX_SESSIONS_OF_A_PEER = 4
_LARGEST_REQUEST = 64 << 10


class Gate(Protocol):
    """Who may come in; `wire.identity.PeerGate`."""

    def check(self, certificate_pem: bytes) -> PeerIdentity:
        """The peer behind a certificate that TLS has verified.

        Raises:
            AuthError: It may not take part, or not any more.
        """
        ...


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
    ) -> None:
        self.port = 0
        self._gate = gate
        self._handler = handler
        self._status = status
        self._renew = renew
        self._refused = refused
        self._limits = limits
        self._timing = timing
        self._pool = BufferPool()
        self._sessions: set[PeerSession] = set()
        self._renewed_at: dict[str, float] = {}  # names are those that the gate lets in
        self._server: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False
        self._certificates: Any = None

    @property
    def sessions(self) -> tuple[PeerSession, ...]:
        """Live streams."""
        return tuple(self._sessions)

    async def start(self, listen: str, identity: TlsIdentity) -> None:
        """Bind and serve; see `serve`."""
        host, port = _split_listen(listen)
        _check_free(host, port)
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
            session.end(TransportError("The server is stopping; reconnect when it is back."))
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

    def _admit(self, context: Any) -> tuple[PeerIdentity, bytes]:
        certificates = context.auth_context().get("x509_pem_cert") or [b""]
        return self._gate.check(certificates[0]), certificates[0]

    async def _serve_session(self, _: Any, context: Any) -> None:
        error: BaseException | None
        try:
            peer, certificate_pem = self._admit(context)
            if self._stopping:
                raise TransportError("The server is stopping; reconnect when it is back.")
            if sum(session.peer.name == peer.name for session in self._sessions) >= _MAX_SESSIONS_OF_A_PEER:
                raise CapacityError(f"{peer.name} has too many open streams; close some.", retry_after_s=10.0)
            await context.send_initial_metadata(((ADMITTED, ""),))
            session = PeerSession(peer, certificate_pem, context, self._limits, self._pool, self._timing)
            self._sessions.add(session)
            try:
                error = await session.run(self._handler, self._timing.close_s)
            finally:
                self._sessions.discard(session)
        except PeerRefused as raised:
            self._note(raised)
            error = raised
        except Exception as raised:  # noqa: BLE001 (everything becomes a status; `status_of` logs what it hides)
            error = raised
        if error is not None:
            await _abort(context, error)

    async def _serve_status(self, _: bytes, context: Any) -> bytes:
        try:
            peer, _pem = self._admit(context)
            return json.dumps(self._status(peer)).encode()
        except Exception as error:
            await _abort(context, error)
            raise

    async def _serve_renew(self, request: bytes, context: Any) -> bytes:
        try:
            peer, certificate_pem = self._admit(context)
            if self._renew is None:
                raise ConfigError("This server does not renew certificates: ask its operator for a new one.")
            if len(request) > _LARGEST_REQUEST:
                raise ProtocolError("The request for a certificate is too large.")
            self._bound_renewals(peer.name)
            return await asyncio.to_thread(self._renew, peer, certificate_pem, request)
        except Exception as error:
            await _abort(context, error)
            raise

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
                    self._gate.check(session.certificate_pem)
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

    Raises:
        ConfigError: The address is none, is in use, or is not of this machine.
    """
    server = WireServer(gate, handler, status, renew, refused, limits, timing)
    await server.start(listen, identity)
    return server


async def _abort(context: Any, error: BaseException) -> None:
    code, sentence, trailers = status_of(error)
    await context.abort(code, sentence, trailers)


def check_listen(listen: str) -> None:
    """Whether `serve` could listen there now, said before a model is loaded for it.

    Raises:
        ConfigError: The address is none, is in use, or is not of this machine.
    """
    _check_free(*_split_listen(listen))


def _split_listen(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is no address to listen on: give HOST:PORT, for example 0.0.0.0:7443.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_free(host: str, port: int) -> None:
    """Find out why an address cannot be bound; gRPC itself only says that it failed, or binds half of a name."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise ConfigError(f"The host {host!r} does not resolve: listen on an address of this machine.") from None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise _bind_error(error, host, port) from None


def _bind_error(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"Port {port} on {host} is in use: stop what uses it, or choose another with --listen.")
    if error.errno == errno.EACCES:
        return ConfigError(f"This user may not listen on port {port}: choose one above 1023 with --listen.")
    return ConfigError(f"{host} is not an address of this machine: listen on one that is, or on 0.0.0.0.")
