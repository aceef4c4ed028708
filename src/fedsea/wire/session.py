"""One stream of one client, as the server sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fedsea.errors import FedseaError
from fedsea.wire.arrival import Arrival
from fedsea.wire.buffers import BufferPool
from fedsea.wire.encoding import Decoder, Encoder
from fedsea.wire.end import StreamEnd
from fedsea.wire.errors import PeerClosed
from fedsea.wire.identity.peers import PeerIdentity
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Message
from fedsea.wire.stream import MessageStream
from fedsea.wire.transport import Timing


class PeerSession(StreamEnd):
    """One stream of one client. Its handler is cancelled when the stream ends: clean up in `finally`.

    Attributes:
        arrival: How it came in.
    """

    def __init__(self, arrival: Arrival, limits: WireLimits, pool: BufferPool, t: Timing) -> None:
        self.arrival = arrival
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

    @property
    def peer(self) -> PeerIdentity:
        """Who it is, from its certificate."""
        return self.arrival.peer

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
        return await self.arrival.transport.read()

    async def _write(self, chunk: bytes) -> None:
        await self.arrival.transport.write(chunk)


async def _awaited(work: Awaitable[None]) -> None:
    await work
