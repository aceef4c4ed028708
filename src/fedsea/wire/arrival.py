"""A stream that has come to the server's port: who brings it, whose it is, and what carries its chunks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

import grpc

from fedsea.errors import AuthError, FedseaError, TransportError
from fedsea.wire.errors import status_of, word_of
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.certificates import Role
from fedsea.wire.identity.peers import PeerIdentity
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import HANDSHAKE_S, Subject
from fedsea.wire.sealing.pipe import SealedPipe, agree_as_server, tell_ready
from fedsea.wire.transport import LAST_WORD, Timing, aio

_BROKEN = (grpc.RpcError, aio.UsageError, aio.InternalError, asyncio.InvalidStateError)
"""What gRPC raises at the server's end of a call that is over; `InternalError` where its client has vanished."""


class Gate(Protocol):
    """Who may come in; `wire.identity.PeerGate`."""

    def check(self, certificate_pem: bytes) -> PeerIdentity:
        """The client behind a certificate whose key it has proven to hold.

        Raises:
            AuthError: It may not take part, or not any more.
        """
        ...

    def check_relay(self, certificate_pem: bytes) -> PeerIdentity:
        """The relay behind a certificate that TLS has verified.

        Raises:
            AuthError: It may not carry anything, or not any more.
        """
        ...


class ContextChunks:
    """What a call carries, at the server's end."""

    def __init__(self, context: Any, name: str) -> None:
        self._context = context
        self._name = name

    async def read(self) -> bytes | None:
        """The next chunk, or None when the client ended its direction."""
        try:
            chunk = await self._context.read()
        except _BROKEN:
            raise TransportError(f"The connection of {self._name} broke.") from None
        return None if chunk is aio.EOF else chunk

    async def write(self, chunk: bytes) -> None:
        """Hand over one chunk."""
        try:
            await self._context.write(chunk)
        except _BROKEN:
            raise TransportError(f"The connection of {self._name} broke.") from None


class Arrival:
    """One call, from the moment that TLS let it in.

    Args:
        gate: Who may come in.
        context: Of gRPC.

    Attributes:
        peer: Who is at the other end of TLS; once sealed, the client, whoever carries its stream.
        certificate_pem: Its certificate.
        relay_pem: The certificate of the relay that brings it, if one does.
        subject: What the stream is for.
        transport: What carries its chunks.

    Raises:
        AuthError: The gate refuses it.
    """

    def __init__(self, gate: Gate, context: Any) -> None:
        (self.certificate_pem,) = (context.auth_context().get("x509_pem_cert") or [b""])[:1]
        self._gate = gate
        self._context = context
        self.relay_pem: bytes | None = None
        if certs.role_of(certs.certificate_from_pem(self.certificate_pem, "What the peer sent")) is Role.RELAY:
            self.peer = gate.check_relay(self.certificate_pem)
            self.relay_pem = self.certificate_pem
        else:
            self.peer = gate.check(self.certificate_pem)
        self.subject = Subject.SESSION
        self.transport: ContextChunks | SealedPipe = ContextChunks(context, self.peer.name)

    def client(self) -> tuple[PeerIdentity, bytes]:
        """The client and its certificate, for calls that are not sealed.

        Raises:
            AuthError: A relay asks.
        """
        if self.relay_pem is not None:
            raise AuthError(
                "A relay passes sealed streams on and asks for nothing itself: the client's address for it must begin "
                "with relay://."
            )
        return self.peer, self.certificate_pem

    async def seal(self, me: SealingIdentity) -> None:
        """Make the handshake, and learn from it whose stream this is.

        From the handshake's end on, whatever is refused is told to the client alone.

        Raises:
            FedseaError: It failed, or the gate does not admit the client.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                handshake, self.transport = await agree_as_server(self.transport, me)
        except TimeoutError:
            raise TransportError(f"The sealed handshake was not done in {HANDSHAKE_S:g} s; connect again.") from None
        client = self._gate.check(handshake.certificate_pem)
        if self.relay_pem is None and client.name != self.peer.name:
            raise AuthError(f"{self.peer.name} brought a stream of another client; only a relay may.")
        self.peer, self.certificate_pem, self.subject = client, handshake.certificate_pem, handshake.subject

    async def open(self) -> None:
        """Tell a client whose stream is sealed that it is let in.

        Raises:
            TransportError: It does not take the word.
        """
        if isinstance(self.transport, SealedPipe):
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await tell_ready(self.transport)
            except TimeoutError:
                raise TransportError(f"{self.peer.name} took no data for {HANDSHAKE_S:g} s; connect again.") from None

    def keep(self, timing: Timing) -> None:
        """Begin to watch whether the other end of a sealed stream is alive; until `release`."""
        if isinstance(self.transport, SealedPipe):
            self.transport.keep(timing.alive_s, timing.silence_s)

    async def release(self) -> None:
        """Stop what `keep` began."""
        if isinstance(self.transport, SealedPipe):
            await self.transport.release()

    def check_again(self) -> None:
        """Whether everybody may stay.

        Raises:
            AuthError: The client or the relay may not.
        """
        self._gate.check(self.certificate_pem)
        if self.relay_pem is not None:
            self._gate.check_relay(self.relay_pem)

    async def end(self) -> None:
        """End our direction in good order."""
        if isinstance(self.transport, SealedPipe):
            with contextlib.suppress(FedseaError):  # the client is gone: it has what it wanted
                await self.transport.end()

    async def abort(self, error: BaseException) -> None:
        """End the call with this error, for the client's eyes if the stream is sealed."""
        if isinstance(self.transport, SealedPipe):
            word = self.transport.keys.seal_last_word(word_of(error))
            await self._context.abort(grpc.StatusCode.ABORTED, "", ((LAST_WORD, word),))
        else:
            await abort(self._context, error)


async def abort(context: Any, error: BaseException) -> None:
    """End a call with this error."""
    code, sentence, trailers = status_of(error)
    await context.abort(code, sentence, trailers)
