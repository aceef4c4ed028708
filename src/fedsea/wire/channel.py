"""The client's end: one outbound connection, mutual TLS only, one stream of messages on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc

from fedsea.errors import FedseaError
from fedsea.wire.calls import CallChunks, Ending, enter, examine, open_channel
from fedsea.wire.encoding import Decoder, Encoder
from fedsea.wire.end import StreamEnd
from fedsea.wire.errors import error_of
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Failure, Message
from fedsea.wire.sealing.handshake import Subject
from fedsea.wire.sealing.pipe import SealedPipe
from fedsea.wire.status import call_renew, call_status
from fedsea.wire.stream import MessageStream
from fedsea.wire.transport import DEFAULT_TIMING, SESSION, Timing

__all__ = ["ClientStream", "call_renew", "call_status", "connect"]


class ClientStream(StreamEnd):
    """An open session with a server; made by `connect`, closed by `close` or by leaving its `async with`."""

    def __init__(
        self,
        address: str,
        channel: Any,
        call: Any,
        transport: CallChunks | SealedPipe,
        encoder: Encoder,
        limits: WireLimits,
        timing: Timing,
    ) -> None:
        self.address = address
        self._channel = channel
        self._call = call
        self._timing = timing
        self._transport = transport
        if isinstance(transport, SealedPipe):
            transport.keep(timing.alive_s, timing.silence_s)
        super().__init__(
            MessageStream(
                self._read,
                self._write,
                encoder,
                Decoder(limits, "client"),
                send_timeout_s=timing.send_timeout_s,
                broken=self._broken,
            )
        )

    @property
    def sealed(self) -> bool:
        """Whether only the server itself can read what is sent here, whoever carries it."""
        return isinstance(self._transport, SealedPipe)

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
                if isinstance(self._transport, SealedPipe):
                    await self._transport.end()
                await self._call.done_writing()
                async for _ in self._stream:
                    pass
        except (TimeoutError, FedseaError, grpc.RpcError, asyncio.InvalidStateError):
            pass  # it is over either way
        finally:
            self._call.cancel()
            await self._stream.release()
            if isinstance(self._transport, SealedPipe):
                await self._transport.release()
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> bytes | None:
        return await self._transport.read()

    async def _write(self, chunk: bytes) -> None:
        await self._transport.write(chunk)

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
        address: `HOST:PORT`, or `relay://HOST:PORT`; see `wire.address`.
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
    channel = open_channel(address, identity, timing)
    call = channel.stream_stream(SESSION)()
    ending = Ending(call, address)
    try:
        async with asyncio.timeout(timeout_s):
            transport = await enter(call, ending, address, identity, Subject.SESSION, timeout_s)
    except TimeoutError:
        await channel.close()
        raise await examine(address, identity, timeout_s) from None
    except BaseException:
        await channel.close()
        raise
    return ClientStream(address, channel, call, transport, encoder or Encoder("client", {}), limits, timing)
