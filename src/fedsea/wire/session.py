"""One stream of one client, as the server sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from fedsea.errors import FedseaError, TransportError
from fedsea.wire.buffers import BufferPool
from fedsea.wire.encoding import Decoder, Encoder
from fedsea.wire.end import StreamEnd
from fedsea.wire.errors import PeerClosed
from fedsea.wire.identity.peers import PeerIdentity
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Message
from fedsea.wire.stream import MessageStream
from fedsea.wire.transport import Timing, aio


class PeerSession(StreamEnd):
    """One stream of one client. Its handler is cancelled when the stream ends: clean up in `finally`.

    Attributes:
        peer: Who it is, from its certificate.
    """

    def __init__(
        self, peer: PeerIdentity, certificate_pem: bytes, context: Any, limits: WireLimits, pool: BufferPool, t: Timing
    ) -> None:
        self.peer = peer
        self.certificate_pem = certificate_pem
        self._context = context
        self._ended: asyncio.Future[FedseaError] = asyncio.get_running_loop().create_future()
        super().__init__(
            MessageStream(
                self._read,
                self._write,
                Encoder("server", {}),
                Decoder(limits, "server", pool),
                send_timeout_s=t.send_timeout_s,
                broken=self.end,
            )
        )

    async def receive(self) -> Message:
        """See `MessageStream.receive`."""
        return await self._stream.receive()

    def __aiter__(self) -> AsyncIterator[Message]:
        """All messages until the client ends the stream in good order."""
        return self._stream.__aiter__()

    @property
    def ended(self) -> bool:
        """Whether `end` was called; the stream itself ends soon after."""
        return self._ended.done()

    def end(self, error: FedseaError) -> None:
        """End the stream with this error, from any task of the event loop; the first one counts."""
        if not self._ended.done():
            self._ended.set_result(error)

    async def fail(self, error: FedseaError) -> None:
        """Send what is on its way, then end the stream with this error."""
        await self._stream.flush(timeout_s=1.0)
        self.end(error)

    async def run(self, handler: Callable[[PeerSession], Awaitable[None]], close_s: float) -> BaseException | None:
        """Run the handler until it returns or the stream ends; what went wrong, if anything."""
        work = asyncio.ensure_future(_awaited(handler(self)))
        try:
            waited: set[asyncio.Future[Any]] = {work, self._ended}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                return self._ended.result()
            await self._stream.flush(close_s)
            error = work.exception()
            return None if isinstance(error, PeerClosed) else error
        finally:
            work.cancel()
            await asyncio.wait({work}, timeout=close_s)
            await self._stream.release()

    async def _read(self) -> bytes | None:
        try:
            chunk = await self._context.read()
        except (grpc.RpcError, aio.UsageError, asyncio.InvalidStateError):
            raise TransportError(f"The connection of {self.peer.name} broke.") from None
        return None if chunk is aio.EOF else chunk

    async def _write(self, chunk: bytes) -> None:
        try:
            await self._context.write(chunk)
        except (grpc.RpcError, aio.UsageError, asyncio.InvalidStateError):
            raise TransportError(f"The connection of {self.peer.name} broke.") from None


async def _awaited(work: Awaitable[None]) -> None:
    await work
