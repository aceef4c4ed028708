"""A relay where TLS ends: it sees every chunk in the clear of TLS, keeps all, and can do with them what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedsea.wire.calls import _PROVISIONAL, _at_once
from fedsea.wire.identity import Authority, Identity, Role, enroll, install
from fedsea.wire.transport import DEFAULT_TIMING, client_options, server_options

aio: Any = grpc.aio


def make_relay(folder: Path, authority: Authority, name: str = "edge") -> Identity:
    """The identity of a relay, approved by the authority."""
    certificate = authority.approve(enroll(folder, name).csr_pem, role=Role.RELAY)
    install(folder, certificate.pem, authority.ca_pem, authority.fingerprint)
    return Identity.load(folder)


@dataclass
class Carried:
    """One call as the relay saw it.

    Attributes:
        up: Chunks from the client, before anything was done to them.
        down: Chunks from the server.
        trailers: What the server said at the end.
        client: The certificate that TLS showed.
    """

    up: list[bytes] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)
    trailers: list[bytes] = field(default_factory=list)
    client: bytes = b""


Meddle = Callable[[Carried, bool, int, bytes], list[bytes]]
"""Gets the call, whether it goes up, the chunk's number in its direction, and the chunk; returns what goes on."""


Status = tuple[grpc.StatusCode, str, tuple[tuple[str, Any], ...]]
"""gRPC's code, its words, and the trailing metadata."""


class Cut(Exception):
    """A meddler ends the stream here, as if the client or the server had.

    Attributes:
        status: What the client is told, on the way down; None is the orderly end.
    """

    def __init__(self, status: Status | None = None) -> None:
        super().__init__()
        self.status = status


def honest(_: Carried, _up: bool, _number: int, chunk: bytes) -> list[bytes]:
    """Pass on."""
    return [chunk]


class Relay:
    """Terminates mutual TLS towards clients, and opens a connection of its own to the server for each call.

    Args:
        identity: Its own.
        server: `HOST:PORT`.

    Attributes:
        meddle: What it does with chunks; may be replaced at any time.
        carried: All calls so far.
        address: For clients.
        passed: Set whenever a chunk has come.
        forged: With (status, words, trailers), every new call is ended with it instead of being passed on.
    """

    def __init__(self, identity: Identity, server: str) -> None:
        self.meddle: Meddle = honest
        self.carried: list[Carried] = []
        self.address = ""
        self.forged: Status | None = None
        self.passed = asyncio.Event()
        self._identity = identity
        self._server_address = server
        self._server: Any = None

    @property
    def seen(self) -> bytes:
        """Everything that went through."""
        return b"\0".join(piece for call in self.carried for piece in (*call.up, *call.down, *call.trailers))

    async def start(self) -> None:
        """Listen."""
        me = self._identity
        self._server = aio.server(options=server_options(DEFAULT_TIMING))
        self._server.add_generic_rpc_handlers((_Everything(self._carry),))
        pair = [(me.key_pem, me.certificate_pem)]
        credentials = grpc.ssl_server_credentials(pair, me.ca_pem, require_client_auth=True)
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        self.address = f"relay://127.0.0.1:{port}"

    async def stop(self) -> None:
        """End every call."""
        await self._server.stop(0.1)

    async def _carry(self, method: str, context: Any) -> None:
        if self.forged is not None:
            await context.abort(*self.forged)
        me, call = self._identity, Carried()
        call.client = (context.auth_context().get("x509_pem_cert") or [b""])[0]
        self.carried.append(call)
        credentials = grpc.ssl_channel_credentials(me.ca_pem, me.key_pem, me.certificate_pem)
        options = client_options(DEFAULT_TIMING, proxy=False)
        async with aio.secure_channel(self._server_address, credentials, options=options) as channel:
            upstream = channel.stream_stream(method)()
            ended = _Ended(upstream)
            up = asyncio.create_task(self._up(call, context, upstream))
            try:
                await context.send_initial_metadata(tuple(await upstream.initial_metadata()))
                await self._pass(call, False, upstream.read, context.write)
            except Cut as cut:
                if cut.status is not None:
                    await context.abort(*cut.status)
                return
            except aio.AioRpcError:
                pass  # it is told below
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
                upstream.cancel()
            code, details, trailers = await ended.status()
            call.trailers += [value if isinstance(value, bytes) else str(value).encode() for _, value in trailers]
            call.trailers.append(details.encode())
            if code is not grpc.StatusCode.OK:
                await context.abort(code, details, trailers)

    async def _up(self, call: Carried, context: Any, upstream: Any) -> None:
        with contextlib.suppress(Cut, aio.AioRpcError, asyncio.InvalidStateError):
            await self._pass(call, True, context.read, upstream.write)
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
            await upstream.done_writing()

    async def _pass(
        self, call: Carried, up: bool, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        kept = call.up if up else call.down
        while (chunk := await read()) is not aio.EOF:
            kept.append(chunk)
            self.passed.set()
            for piece in self.meddle(call, up, len(kept) - 1, chunk):
                await write(piece)


class _Ended:
    """How a call ended, noted before a write that meets the end puts gRPC's own words in the place of the server's."""

    def __init__(self, call: Any) -> None:
        self._known = asyncio.Event()
        self._found: Status = (grpc.StatusCode.UNAVAILABLE, "", ())
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        if not self._known.is_set() and _at_once(call.details()) != _PROVISIONAL:
            trailers = tuple(_at_once(call.trailing_metadata()) or ())
            self._found = (_at_once(call.code()), _at_once(call.details()) or "", trailers)
            self._known.set()

    async def status(self) -> Status:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await self._known.wait()
        return self._found


class _Everything(grpc.GenericRpcHandler):  # type: ignore[misc]
    """One handler for every method."""

    def __init__(self, carry: Callable[[str, Any], Awaitable[None]]) -> None:
        self._carry = carry

    def service(self, details: Any) -> Any:
        async def handler(_: Any, context: Any) -> None:
            await self._carry(details.method, context)

        return grpc.stream_stream_rpc_method_handler(handler)


@asynccontextmanager
async def relaying(identity: Identity, server: str) -> AsyncIterator[Relay]:
    """A relay on this event loop."""
    relay = Relay(identity, server)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


@contextlib.contextmanager
def relay_thread(identity: Identity, server: str) -> Iterator[Relay]:
    """A relay on a thread of its own."""
    relay, loop = Relay(identity, server), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(relay.start(), loop).result(10.0)
    try:
        yield relay
    finally:
        asyncio.run_coroutine_threadsafe(relay.stop(), loop).result(10.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        loop.close()
