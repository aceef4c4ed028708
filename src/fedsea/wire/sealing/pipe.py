"""The sealed layer of a stream: chunks above, records below; and how both ends come to it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from fedsea.errors import FedseaError, ProtocolError, TransportError
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import ClientHandshake, ServerHandshake
from fedsea.wire.sealing.keys import SealBroken, StreamKeys

_READY = b"ready"
_ALIVE = b"alive"
"""Said when nothing else is. No frame begins so."""


class Transport(Protocol):
    """What carries records."""

    async def read(self) -> bytes | None:
        """The next one; None when the transport has ended well."""
        ...

    async def write(self, chunk: bytes) -> None:
        """Hand one over."""
        ...


class SealedPipe:
    """A transport that is sealed; itself a transport.

    Pings of the connection say that the relay is alive, not the peer behind it. So once `keep` is called each side
    says so itself, sealed, when it has nothing else to say. That also uncovers a last record that was held back.

    Args:
        transport: Below.
        keys: Of this stream.
    """

    def __init__(self, transport: Transport, keys: StreamKeys) -> None:
        self.keys = keys
        self._transport = transport
        self._order = asyncio.Lock()  # records go out in the order in which they were sealed
        self._silence_s: float | None = None
        self._said_something = False
        self._keeper: asyncio.Task[None] | None = None

    def keep(self, alive_s: float, silence_s: float) -> None:
        """Begin to tell the peer that we are alive, and to expect the same; until `release`.

        Args:
            alive_s: Time without a record of ours after which we send one.
            silence_s: Longest time to wait for a record of the peer.
        """
        self._silence_s = silence_s
        self._keeper = asyncio.create_task(self._say_alive(alive_s))

    async def release(self) -> None:
        """Stop what `keep` began."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def read(self) -> bytes | None:
        """The next chunk; None when the peer itself has ended its direction.

        Raises:
            SealBroken: The transport brought something else, ended where the peer did not, or brought nothing.
        """
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    record = await self._transport.read()
            except TimeoutError:
                raise SealBroken(
                    f"Nothing came from the other end of the sealed stream for {self._silence_s:g} s, though the "
                    "connection stands: it, or the way behind a relay, has failed; reconnect."
                ) from None
            if record is None:
                raise SealBroken(
                    "The sealed stream was cut: its end does not come from the peer, so what was last sent may be "
                    "lost; reconnect."
                )
            chunk = self.keys.opener.open(record)
            if chunk != _ALIVE:
                return chunk

    async def write(self, chunk: bytes) -> None:
        """Seal a chunk and hand it over."""
        assert chunk, "an empty chunk would be the end"
        await self._send(chunk)

    async def end(self) -> None:
        """End our direction, so that the peer can tell it from a cut."""
        await self.release()
        await self._send(b"")

    async def _send(self, chunk: bytes) -> None:
        self._said_something = True
        async with self._order:
            await self._transport.write(self.keys.sealer.seal(chunk))

    async def _say_alive(self, alive_s: float) -> None:
        with contextlib.suppress(FedseaError):  # whoever reads or writes meets the same
            while True:
                self._said_something = False
                await asyncio.sleep(alive_s)
                if not self._said_something:
                    # What is sealed has to go out, or what follows does not open: `release` must not cut it short.
                    sending = asyncio.create_task(self._send(_ALIVE))
                    sending.add_done_callback(_seen)
                    await asyncio.shield(sending)


def _seen(task: asyncio.Task[None]) -> None:
    """Mark a task's error as known, even if nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


async def agree_as_client(transport: Transport, handshake: ClientHandshake) -> StreamKeys:
    """Go on with a handshake whose offer is sent, to the keys.

    Raises:
        AuthError: It is not the federation's server that answers.
        FedseaError: What else went wrong.
    """
    proof, keys = handshake.finish(await _next(transport))
    await transport.write(proof)
    return keys


async def await_ready(pipe: SealedPipe) -> None:
    """Client: wait until the server has let us in.

    Raises:
        FedseaError: It did not.
    """
    if await pipe.read() != _READY:
        raise ProtocolError("The server did not open the sealed stream as it should; connect again.")


async def tell_ready(pipe: SealedPipe) -> None:
    """Server: let the client in."""
    await pipe.write(_READY)


async def agree_as_server(transport: Transport, me: SealingIdentity) -> tuple[ServerHandshake, SealedPipe]:
    """Make the handshake; who the client is, and whether it may take part, is for the caller to check.

    Raises:
        FedseaError: What went wrong.
    """
    handshake = ServerHandshake(me)
    await transport.write(handshake.answer(await _next(transport)))
    return handshake, SealedPipe(transport, handshake.finish(await _next(transport)))


async def _next(transport: Transport) -> bytes:
    message = await transport.read()
    if message is None:
        raise TransportError("The connection ended in the middle of the sealed handshake; connect again.")
    return message
