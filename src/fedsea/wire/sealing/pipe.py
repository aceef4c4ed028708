"""The sealed layer of a stream: chunks above, records below; and how both ends come to it."""

from __future__ import annotations

from typing import Protocol

from fedsea.errors import ProtocolError, TransportError
from fedsea.wire.sealing.handshake import ClientHandshake, SealingIdentity, ServerHandshake
from fedsea.wire.sealing.keys import SealBroken, StreamKeys

_READY = b"ready"


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

    Args:
        transport: Below.
        keys: Of this stream.
    """

    def __init__(self, transport: Transport, keys: StreamKeys) -> None:
        self.keys = keys
        self._transport = transport

    async def read(self) -> bytes | None:
        """The next chunk; None when the peer itself has ended its direction.

        Raises:
            SealBroken: The transport brought something else, or ended where the peer did not.
        """
        record = await self._transport.read()
        if record is None:
            raise SealBroken(
                "The sealed stream was cut: its end does not come from the peer, so what was last sent may be lost; "
                "reconnect."
            )
        return self.keys.opener.open(record)

    async def write(self, chunk: bytes) -> None:
        """Seal a chunk and hand it over."""
        assert chunk, "an empty chunk would be the end"
        await self._transport.write(self.keys.sealer.seal(chunk))

    async def end(self) -> None:
        """End our direction, so that the peer can tell it from a cut."""
        await self._transport.write(self.keys.sealer.seal(b""))


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
