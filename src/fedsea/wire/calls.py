"""Calls at the client's end: the channel below them, and why one ended."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import grpc

from fedsea.errors import FedseaError, TransportError
from fedsea.wire.address import split_address, through_relay, tls_name
from fedsea.wire.errors import CODE_KEY, PeerClosed, error_from_status, error_of_word, unconfirmed
from fedsea.wire.identity.diagnose import diagnose
from fedsea.wire.identity.identity import Identity
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import ClientHandshake, Subject
from fedsea.wire.sealing.keys import SealBroken, StreamKeys
from fedsea.wire.sealing.pipe import SealedPipe, agree_as_client, await_ready
from fedsea.wire.transport import ADMITTED, LAST_WORD, SEALED, Timing, aio, client_options

T = TypeVar("T")

_UNEXPLAINED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN})
"""gRPC's own words for these do not say what to do; a look at the connection with plain sockets does."""

_PROVISIONAL = "Internal error from Core"
_STATUS_S = 2.0
"""Longest wait for the server's status once the call is known to have ended."""


class TlsIdentity(Protocol):
    """What a connection needs of `wire.identity.Identity`."""

    @property
    def key_pem(self) -> bytes:
        """Private key."""
        ...

    @property
    def certificate_pem(self) -> bytes:
        """Certificate chain."""
        ...

    @property
    def ca_pem(self) -> bytes:
        """The authority whose peers are trusted."""
        ...


class Ending:
    """How a call ended, noted the moment gRPC knows it.

    A write that meets the end of a call replaces the status that the server sent by a meaningless one of gRPC's own.

    Args:
        call: A gRPC call.
        address: Its server, for messages.

    Attributes:
        keys: Of a sealed stream; from then on only what the server sealed counts as its word.
    """

    def __init__(self, call: Any, address: str) -> None:
        self.keys: StreamKeys | None = None
        self._call = call
        self._address = address
        self._known = asyncio.Event()
        self._found: tuple[grpc.StatusCode, str, dict[str, str]] | None = None
        self._last_word = b""
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        if self._found is None and _at_once(call.details()) != _PROVISIONAL:
            trailers = _at_once(call.trailing_metadata())
            self._last_word = dict(trailers or ()).get(LAST_WORD, b"")
            self._found = (_at_once(call.code()), *_words(_at_once(call.details()), trailers))
            self._known.set()

    async def reason(self) -> FedseaError:
        """Why the call ended: what the server said, if it said something."""
        try:
            async with asyncio.timeout(_STATUS_S):
                await self._known.wait()
        except TimeoutError:
            pass
        code, details, trailers = self._found or (grpc.StatusCode.UNAVAILABLE, "", {})
        if self.keys is not None and not (code is grpc.StatusCode.OK and self.keys.opener.ended):
            word = self.keys.open_last_word(self._last_word)
            return error_of_word(word) if word is not None else self._cut()
        if code is grpc.StatusCode.OK:
            return PeerClosed(f"{self._address} has ended the stream.")
        error = error_from_status(code, details, trailers, self._address)
        return unconfirmed(error) if through_relay(self._address) and CODE_KEY in trailers else error

    def _cut(self) -> FedseaError:
        return SealBroken(
            f"The sealed stream through {self._address} ended without a word from the server: the connection, or the "
            "relay, broke it; reconnect."
        )

    async def reason_at_start(self, identity: Identity, timeout_s: float) -> FedseaError:
        """Why a call did not come up: what the server said, else what an examination of the connection finds."""
        error = await self.reason()
        code, _, trailers = self._found or (grpc.StatusCode.UNAVAILABLE, "", {})
        if CODE_KEY not in trailers and code in _UNEXPLAINED:
            return await examine(self._address, identity, timeout_s)
        return error


async def examine(address: str, identity: Identity, timeout_s: float) -> FedseaError:
    """`identity.diagnose` beside the event loop."""
    return await asyncio.to_thread(diagnose, address, identity, timeout_s)


def open_channel(address: str, identity: TlsIdentity, timing: Timing) -> Any:
    """A channel with mutual TLS; it connects with its first call.

    Raises:
        ConfigError: The address is none.
    """
    host, port = split_address(address)
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
    options = client_options(timing, proxy=not _is_loopback(host))
    if through_relay(address):
        options.append(("grpc.ssl_target_name_override", tls_name(address)))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return aio.secure_channel(address, credentials, options=options)


@asynccontextmanager
async def opened_channel(address: str, identity: TlsIdentity, timing: Timing) -> AsyncIterator[Any]:
    """The same, closed afterwards."""
    channel = open_channel(address, identity, timing)
    try:
        yield channel
    finally:
        await channel.close()


class CallChunks:
    """What a call carries; the errors say why it ended.

    Args:
        call: Of gRPC, both ways streaming.
        ending: Of the same call.
        address: Its server, for messages.
    """

    def __init__(self, call: Any, ending: Ending, address: str) -> None:
        self._call = call
        self._ending = ending
        self._address = address

    async def read(self) -> bytes | None:
        """The next chunk, or None at the orderly end."""
        try:
            chunk = await self._call.read()
        except aio.AioRpcError:
            raise await self._ending.reason() from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _being_cancelled():
                raise self._closed_here() from None
            raise
        return None if chunk is aio.EOF else chunk

    async def write(self, chunk: bytes) -> None:
        """Hand over one chunk."""
        try:
            await self._call.write(chunk)
        except (aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._ending.reason() from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _being_cancelled():
                raise self._closed_here() from None
            raise

    def _closed_here(self) -> FedseaError:
        return TransportError(f"The stream to {self._address} was closed on this side; reconnect.")


async def enter(
    call: Any, ending: Ending, address: str, identity: Identity, subject: Subject, timeout_s: float
) -> CallChunks | SealedPipe:
    """Wait until the server has let a stream in, sealed if this side or the server wants it so.

    Through a relay it is sealed whatever anybody says: a relay cannot talk a client out of it. Without one, TLS has
    shown that the server itself says whether.

    Raises:
        FedseaError: Why it did not.
    """
    chunks, handshake = CallChunks(call, ending, address), None
    if through_relay(address):
        # At once: it saves a round trip, and some relays pass a call's first words on only with its first bytes.
        handshake = ClientHandshake(SealingIdentity.of(identity), subject)
        try:
            await chunks.write(handshake.offer)
        except FedseaError:
            raise await ending.reason_at_start(identity, timeout_s) from None
    metadata = tuple(await call.initial_metadata())
    if (ADMITTED, "") not in metadata:
        raise await ending.reason_at_start(identity, timeout_s)
    if handshake is None and (SEALED, "") not in metadata:
        return chunks
    if handshake is None:
        handshake = ClientHandshake(SealingIdentity.of(identity), subject)
        await chunks.write(handshake.offer)
    ending.keys = await agree_as_client(chunks, handshake)
    pipe = SealedPipe(chunks, ending.keys)
    await await_ready(pipe)
    return pipe


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(details: str | None, trailers: Any) -> tuple[str, dict[str, str]]:
    return details or "", {str(key): str(value) for key, value in trailers or ()}


def _at_once(answer: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    answer.close()
    raise AssertionError("gRPC asked to wait for the status of a finished call")
