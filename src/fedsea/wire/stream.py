"""One end of a stream of messages, whatever carries it.

Sending and receiving run independently: a side that only sends until it is done, while the other does the same, would
wait for ever once the buffers between them are full. So callers keep a receiver running while they send. Cancelling
`send` or `receive` is safe: a message that was begun is sent to its end, a chunk that has arrived is kept.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from fedsea.errors import FedseaError, TransportError
from fedsea.wire.encoding import Decoder, Encoded, Encoder
from fedsea.wire.errors import PeerClosed
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Message

_MAX_WAITING_SENDS = 1024


@dataclass(slots=True)
class LinkStats:
    """Bytes of one stream by kind of message, without what sealing, TLS and HTTP/2 add.

    Attributes:
        sent: Frame bytes handed to the network, by class name of the message.
        sent_payload: Thereof tensors.
        received: Frame bytes that arrived.
        received_payload: Thereof tensors.
        sent_messages: Number of messages sent; likewise for `received_messages`.
    """

    sent: Counter[str] = field(default_factory=Counter)
    sent_payload: Counter[str] = field(default_factory=Counter)
    sent_messages: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    received_payload: Counter[str] = field(default_factory=Counter)
    received_messages: Counter[str] = field(default_factory=Counter)

    @property
    def sent_bytes(self) -> int:
        """Of all kinds."""
        return self.sent.total()

    @property
    def received_bytes(self) -> int:
        """Of all kinds."""
        return self.received.total()


class MessageStream:
    """Messages over a transport that carries chunks.

    Args:
        read: Next chunk, or None at the orderly end; raises a `FedseaError` when the transport broke.
        write: Hand over one chunk; raises a `FedseaError` when the transport broke.
        encoder: May be replaced when the codecs are agreed on.
        decoder: Its limits may be replaced likewise.
        send_timeout_s: Longest wait for one chunk to be accepted.
        broken: Called once when a send did not finish; the transport is to be torn down.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes | None]],
        write: Callable[[bytes], Awaitable[None]],
        encoder: Encoder,
        decoder: Decoder,
        *,
        send_timeout_s: float,
        broken: Callable[[FedseaError], None],
    ) -> None:
        self.encoder = encoder
        self.stats = LinkStats()
        self._decoder = decoder
        self._read = read
        self._write = write
        self._send_timeout_s = send_timeout_s
        self._broken = broken
        self._sending: set[asyncio.Task[None]] = set()
        self._send_lock = asyncio.Lock()
        self._receive_lock = asyncio.Lock()
        self._reading: asyncio.Task[bytes | None] | None = None
        self._error: FedseaError | None = None  # of sending
        self._torn_down: FedseaError | None = None

    @property
    def limits(self) -> WireLimits:
        """What the peer may announce; replace them when the plan is agreed on."""
        return self._decoder.limits

    @limits.setter
    def limits(self, limits: WireLimits) -> None:
        self._decoder.limits = limits

    async def send(self, message: Message | Encoded) -> Encoded:
        """Send a message; returns when the network has accepted it. Messages go out in the order of the calls.

        Returns:
            Its bytes, to be sent again should the stream break.

        Raises:
            FedseaError: Of `Encoder.encode`, or why the stream broke.
        """
        if self._error is not None:
            raise self._error
        self._read_ahead()
        encoded = message if isinstance(message, Encoded) else self.encoder.encode(message)
        if len(self._sending) >= _MAX_WAITING_SENDS:
            raise self._tear_down(TransportError("The peer reads too slowly: too many messages wait. Reconnect."))
        task = asyncio.create_task(self._write_all(encoded))
        self._sending.add(task)
        task.add_done_callback(self._sent)
        await asyncio.shield(task)
        return encoded

    async def receive(self) -> Message:
        """The next message.

        Raises:
            PeerClosed: The peer has ended the stream in good order.
            NonFiniteMessage: A message held a NaN and was dropped; call again for the next one.
            ProtocolError: The peer broke the protocol; the stream is of no more use.
            TransportError: The connection broke, or the peer ended the stream in the middle of a message.
        """
        async with self._receive_lock:
            while True:
                chunk = await self._next_chunk()
                if chunk is None:
                    if self._decoder.in_message:
                        raise TransportError("The peer ended the stream in the middle of a message; reconnect.")
                    raise PeerClosed("The peer has ended the stream.")
                try:
                    message = self._decoder.feed(chunk)
                finally:
                    self.stats.received[self._decoder.kind] += len(chunk)
                if message is not None:
                    self.stats.received_messages[self._decoder.kind] += 1
                    self.stats.received_payload[self._decoder.kind] += self._decoder.payload_bytes
                    return message

    async def __aiter__(self) -> AsyncIterator[Message]:
        """All messages until the peer ends the stream in good order."""
        while True:
            try:
                message = await self.receive()
            except PeerClosed:
                return
            yield message

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything that was begun is sent, or the time is up."""
        if self._sending:
            await asyncio.wait(set(self._sending), timeout=timeout_s)

    async def release(self) -> None:
        """Stop the tasks of this stream; the transport is torn down by its owner."""
        tasks: list[asyncio.Task[None] | asyncio.Task[bytes | None]] = list(self._sending)
        if self._reading is not None:
            tasks.append(self._reading)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _read_ahead(self) -> asyncio.Task[bytes | None]:
        """Keep one read under way: gRPC learns of the stream's end, and why, through a read only."""
        if self._reading is None:
            self._reading = asyncio.create_task(_awaited(self._read()))
            self._reading.add_done_callback(_seen)
        return self._reading

    async def _next_chunk(self) -> bytes | None:
        try:
            chunk = await asyncio.shield(self._read_ahead())
        except FedseaError:
            if self._torn_down is not None:
                raise self._torn_down from None
            raise
        if chunk is not None:
            self._reading = None
            self._read_ahead()
        return chunk  # None stays: every later call meets the same end

    async def _write_all(self, encoded: Encoded) -> None:
        async with self._send_lock:
            if self._error is not None:
                raise self._error
            try:
                for chunk in encoded.chunks:
                    async with asyncio.timeout(self._send_timeout_s):
                        await self._write(chunk)
                    self.stats.sent[encoded.kind] += len(chunk)
            except TimeoutError:
                raise self._tear_down(
                    TransportError(f"The peer took no data for {self._send_timeout_s:g} s; the stream was closed.")
                ) from None
            except FedseaError as error:
                self._error = self._error or error  # what the peer sent before can still be received
                raise
            self.stats.sent_messages[encoded.kind] += 1
            self.stats.sent_payload[encoded.kind] += encoded.payload_bytes

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        _seen(task)

    def _tear_down(self, error: FedseaError) -> FedseaError:
        if self._torn_down is None:
            self._error = self._torn_down = error
            self._broken(error)
        return self._torn_down


async def _awaited(reading: Awaitable[bytes | None]) -> bytes | None:
    return await reading


def _seen(task: asyncio.Task[None] | asyncio.Task[bytes | None]) -> None:
    """Mark a task's error as known even if nobody waits for it any more."""
    if not task.cancelled():
        task.exception()
