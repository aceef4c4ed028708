"""What client and server can do alike with their end of a stream."""

from __future__ import annotations

from fedsea.wire.encoding import Encoded, Encoder
from fedsea.wire.limits import WireLimits
from fedsea.wire.messages import Message
from fedsea.wire.stream import LinkStats, MessageStream


class StreamEnd:
    """One end of a stream of messages.

    Args:
        stream: The messages; who carries them is the owner's business.
    """

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream

    @property
    def stats(self) -> LinkStats:
        """Bytes so far."""
        return self._stream.stats

    @property
    def limits(self) -> WireLimits:
        """What the peer may announce; replace them when the plan is agreed on."""
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
