"""The client's end: one outbound connection, mutual TLS only, one stream of messages on it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from fedsea.errors import FedseaError, ProtocolError, TransportError
from fedsea.wire.encoding import Decoder, Encoded, Encoder
from fedsea.wire.errors import CODE_KEY, error_from_status, error_of
from fedsea.wire.identity.diagnose import diagnose, split_address
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Failure, Message
from fedsea.wire.stream import LinkStats, MessageStream
from fedsea.wire.transport import DEFAULT_TIMING, RENEW, SESSION, STATUS, Timing, aio, client_options

_UNEXPLAINED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN})
"""gRPC's own words for these do not say what to do; a look at the connection with plain sockets does."""


class ClientIdentity(Protocol):
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
        """The authority whose servers are trusted."""
        ...


class ClientStream:
    """An open session with a server; made by `connect`, closed by `close` or by leaving its `async with`."""

    def __init__(self, address: str, channel: Any, call: Any, encoder: Encoder, decoder: Decoder, timing: Timing):
        self.address = address
        self._channel = channel
        self._call = call
        self._timing = timing
        self._stream = MessageStream(
            self._read, self._write, encoder, decoder, send_timeout_s=timing.send_timeout_s, broken=self._broken
        )

    @property
    def stats(self) -> LinkStats:
        """Bytes so far."""
        return self._stream.stats

    @property
    def limits(self) -> WireLimits:
        """What the server may announce; replace them when the plan is agreed on."""
        return self._stream.limits

    @limits.setter
    def limits(self, limits: WireLimits) -> None:
        self._stream.limits = limits

    @property
    def encoder(self) -> Encoder:
        """Replace it when the codecs are agreed on."""
        return self._stream.encoder

    @encoder.setter
    def encoder(self, encoder: Encoder) -> None:
        self._stream.encoder = encoder

    async def send(self, message: Message | Encoded) -> Encoded:
        """See `MessageStream.send`: keep a receiver running meanwhile."""
        return await self._stream.send(message)

    async def receive(self) -> Message:
        """The next message.

        Raises:
            FedseaError: What the server reported with a fatal `Failure` or by ending the stream;
                `NonFiniteMessage` drops one message only, `PeerClosed` is the orderly end.
        """
        message = await self._stream.receive()
        if isinstance(message, Failure) and message.fatal:
            raise error_of(message)
        return message

    async def __aiter__(self) -> AsyncIterator[Message]:
        """All messages until the server ends the stream in good order."""
        async for message in self._stream:
            if isinstance(message, Failure) and message.fatal:
                raise error_of(message)
            yield message

    async def close(self) -> None:
        """End the stream: what was sent arrives, what the server still sends is dropped; bounded in time."""
        try:
            async with asyncio.timeout(self._timing.close_s):
                await self._stream.flush(self._timing.close_s)
                await self._call.done_writing()
                async for _ in self._stream:
                    pass
        except (TimeoutError, FedseaError, grpc.RpcError, asyncio.InvalidStateError):
            pass  # it is over either way
        finally:
            self._call.cancel()
            await self._stream.release()
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> bytes | None:
        try:
            chunk = await self._call.read()
        except aio.AioRpcError as error:
            raise await _explain(error, self.address) from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _being_cancelled():
                raise TransportError(f"The stream to {self.address} was closed on this side; reconnect.") from None
            raise
        return None if chunk is aio.EOF else chunk

    async def _write(self, chunk: bytes) -> None:
        try:
            await self._call.write(chunk)
        except aio.AioRpcError as error:
            raise await _explain(error, self.address) from None
        except asyncio.InvalidStateError:
            raise TransportError(f"The stream to {self.address} has ended; reconnect.") from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _being_cancelled():
                raise TransportError(f"The stream to {self.address} was closed on this side; reconnect.") from None
            raise

    def _broken(self, _: FedseaError) -> None:
        self._call.cancel()


async def connect(
    address: str,
    identity: Identity,
    *,
    limits: WireLimits,
    encoder: Encoder | None = None,
    timeout_s: float = 10.0,
    timing: Timing = DEFAULT_TIMING,
) -> ClientStream:
    """Open a session with a server.

    Args:
        address: `HOST:PORT`.
        identity: Ours.
        limits: What the server may announce, until they are replaced: usually `limits.HANDSHAKE`.
        encoder: Of what is sent; by default one for the handshake, without codecs.
        timeout_s: Longest time until the server has admitted us.
        timing: Deadlines afterwards.

    Raises:
        TransportError: The server cannot be reached; trying again may help.
        AuthError: A certificate is foreign, expired, revoked or not on the list.
        FedseaError: What else the server answered.
    """
    channel = _open(address, identity, timing)
    call = channel.stream_stream(SESSION)()
    try:
        async with asyncio.timeout(timeout_s):
            await call.initial_metadata()
            if call.done():
                raise await _explained_end(call)
    except aio.AioRpcError as error:
        await channel.close()
        raise await _explain(error, address, identity, timeout_s) from None
    except TimeoutError:
        await channel.close()
        raise await _diagnose(address, identity, timeout_s) from None
    except BaseException:
        await channel.close()
        raise
    decoder = Decoder(limits, "client")
    return ClientStream(address, channel, call, encoder or Encoder("client", {}), decoder, timing)


async def call_status(address: str, identity: Identity, timeout_s: float = 10.0) -> dict[str, Any]:
    """Ask a server how it stands.

    Raises:
        FedseaError: As `connect`.
    """
    answer = await _unary(address, identity, STATUS, b"", timeout_s)
    try:
        status = json.loads(answer)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise ProtocolError(f"{address} answered with something that is no status: check that both sides are fedsea.")
    return status


async def call_renew(address: str, identity: Identity, csr_pem: bytes, timeout_s: float = 10.0) -> bytes:
    """Have a server sign a request for a new certificate of the same name.

    Returns:
        The certificate, PEM.

    Raises:
        FedseaError: As `connect`, or the server's reason for refusing.
    """
    return await _unary(address, identity, RENEW, csr_pem, timeout_s)


async def _unary(address: str, identity: Identity, method: str, request: bytes, timeout_s: float) -> bytes:
    async with _opened(address, identity) as channel:
        try:
            answer: bytes = await channel.unary_unary(method)(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            raise await _explain(error, address, identity, timeout_s) from None
        return answer


@asynccontextmanager
async def _opened(address: str, identity: ClientIdentity) -> AsyncIterator[Any]:
    channel = _open(address, identity, DEFAULT_TIMING)
    try:
        yield channel
    finally:
        await channel.close()


def _open(address: str, identity: ClientIdentity, timing: Timing) -> Any:
    host, _ = split_address(address)
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
    options = client_options(timing, proxy=not _is_loopback(host))
    return aio.secure_channel(address, credentials, options=options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _explained_end(call: Any) -> BaseException:
    failed: BaseException = aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )
    return failed


async def _explain(error: Any, address: str, identity: Identity | None = None, timeout_s: float = 10.0) -> FedseaError:
    """What a failed call means; with an identity (a connection that did not come up), examine the connection too."""
    trailers = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    if identity is not None and CODE_KEY not in trailers and error.code() in _UNEXPLAINED:
        return await _diagnose(address, identity, timeout_s)
    return error_from_status(error.code(), error.details() or "", trailers, address)


async def _diagnose(address: str, identity: Identity, timeout_s: float) -> FedseaError:
    return await asyncio.to_thread(diagnose, address, identity, timeout_s)
