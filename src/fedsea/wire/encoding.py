"""Messages to chunks of bytes and back.

An encoder takes each release once; what it returns may be sent as often as needed, and is always the same bytes. A
decoder belongs to one stream, assembles one message at a time, and allocates only after the header passed all checks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import numpy as np
import torch

from fedsea.errors import NonFiniteError, ProtocolError, UnprotectedRelease
from fedsea.types import Channel, Release, Reply
from fedsea.wire.assembly import Assembly, Discarded
from fedsea.wire.buffers import BufferPool
from fedsea.wire.checks import check_fields, check_frame, place
from fedsea.wire.codecs import CODECS, IN_PLACE, WORDS, check_codec
from fedsea.wire.errors import NonFiniteMessage
from fedsea.wire.frames import KINDS, Frame, Kind, Role, TensorSpec, fields_of, read_header, write_header
from fedsea.wire.limits import CHUNK_BYTES, WireLimits
from fedsea.wire.messages import Message


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message as bytes; keep it to send the very same bytes again.

    Attributes:
        chunks: Pieces to send in order.
        num_bytes: Sum of the pieces.
        payload_bytes: Thereof tensors.
        kind: Class name of the message.
    """

    chunks: tuple[bytes, ...]
    num_bytes: int
    payload_bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Sealed:
    """A release in the form of a payload: it may be put into several messages, and is always the same bytes.

    Only an encoder makes one, and at a client only out of a release: it is sent without being asked where it is from.

    Attributes:
        channel: What the release was made for.
        specs: Name, codec and shape of its tensors.
        pieces: Their encoded bytes; they cannot be written to.
    """

    channel: Channel
    specs: tuple[TensorSpec, ...]
    pieces: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        maker = sys._getframe(2).f_globals.get("__name__", "")  # behind the generated __init__
        if maker != __name__:
            raise UnprotectedRelease(f"A payload was made in {maker}; only an encoder may make one.")
        for piece in self.pieces:
            piece.setflags(write=False)

    def __init_subclass__(cls, **_: object) -> None:
        raise UnprotectedRelease(f"{cls.__name__} would be a payload that no encoder made.")

    def __copy__(self) -> NoReturn:
        raise UnprotectedRelease("A payload was about to be copied; put the same one into every message instead.")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        self.__copy__()

    @property
    def num_rows(self) -> int:
        """T of a hidden state or gradient."""
        return self.specs[0].shape[0]

    def head(self, num_rows: int) -> Sealed:
        """The first rows of a hidden state or gradient: the very same bytes."""
        (spec,) = _like(self, [])
        pieces = tuple(piece[: len(piece) // self.num_rows * num_rows] for piece in self.pieces)
        return Sealed(self.channel, (replace(spec, shape=(num_rows, *spec.shape[1:])),), pieces)

    def followed_by(self, *others: Sealed) -> Sealed:
        """The rows of several hidden states, one after the other: the very same bytes."""
        (spec,) = _like(self, others)
        every = (self, *others)
        pieces = tuple(np.concatenate(same) for same in zip(*(one.pieces for one in every), strict=True))
        shape = (sum(one.num_rows for one in every), *spec.shape[1:])
        return Sealed(self.channel, (replace(spec, shape=shape),), pieces)


def _not_filled(self: Sealed, _state: object) -> NoReturn:
    self.__copy__()


Sealed.__setstate__ = _not_filled  # type: ignore[attr-defined]  # Python before 3.11.4 would replace one in the class


def _like(first: Sealed, others: Sequence[Sealed]) -> tuple[TensorSpec, ...]:
    """What is in a payload, if it and all others came from an encoder and hold rows of one kind.

    Raises:
        UnprotectedRelease: They do not.
    """
    if any(type(one) is not Sealed for one in (first, *others)):
        raise UnprotectedRelease("Rows were about to be taken from what is no payload of an encoder.")
    kinds = {
        (one.channel, *((spec.name, spec.codec, spec.shape[1:]) for spec in one.specs)) for one in (first, *others)
    }
    if len(kinds) > 1:
        raise UnprotectedRelease("Payloads of different kinds were about to be joined.")
    return first.specs


class Encoder:
    """Turns messages into bytes; holds no state between messages, so any thread may call it.

    Args:
        role: Own side: it decides which messages may be sent, and that a client sends releases only.
        codecs: Codec of hidden states and of gradients; empty before the handshake. Bundles are always fp32.

    Raises:
        ConfigError: There is no such codec.
    """

    def __init__(self, role: Role, codecs: Mapping[Channel, str]) -> None:
        self.role = role
        self.codecs = {channel: check_codec(name) for channel, name in codecs.items()}

    def encode(self, message: Message) -> Encoded:
        """The bytes of a message.

        Raises:
            UnprotectedRelease: A client's tensors are no release, or one that was taken before, or one for
                another channel.
            NonFiniteError: A value is NaN or infinite, or does not fit the codec.
            ProtocolError: This side may not send such a message, or a field is out of its range.
        """
        kind = KINDS.get(type(message))
        if kind is None or self.role not in kind.senders:
            raise ProtocolError(f"A {self.role} does not send a {type(message).__name__}.")
        fields = fields_of(message)
        check_fields(kind, fields)
        if kind.name == "Welcome":
            payload = np.frombuffer(cast(Any, message).plan_json.encode(), dtype=np.uint8)
            return _cut(kind, fields, (), [payload])
        if kind.channel is None:
            return _cut(kind, fields, (), [])
        value = cast(Any, message).tensors
        if isinstance(value, Mapping) and not value and kind.optional:
            return _cut(kind, fields, (), [])
        sealed = self._sealed(kind, kind.channel, value, fields)
        specs, pieces = sealed.specs, sealed.pieces
        if kind.second is not None:
            second = self._sealed(kind, kind.second, cast(Any, message).gradient, fields)
            specs += tuple(replace(spec, name="gradient") for spec in second.specs)
            pieces += second.pieces
        _check_own_specs(kind, specs, fields)
        return _cut(kind, fields, specs, pieces)

    def _sealed(self, kind: Kind, channel: Channel, value: object, fields: Mapping[str, Any]) -> Sealed:
        try:
            sealed = value if type(value) is Sealed else self._seal(kind, channel, value)
        except NonFiniteError as error:
            raise NonFiniteMessage(f"{kind.name}: {error.message}", kind.name, **place(fields)) from None
        if sealed.channel is not channel:
            raise UnprotectedRelease(f"A release made for {sealed.channel} was put into a {kind.name}.")
        return sealed

    def seal(self, release: Release) -> Sealed:
        """Take a release's tensors once, in the form in which every sending will have them.

        Raises:
            UnprotectedRelease: It is no release, or was taken before.
            NonFiniteError: A value does not fit the codec.
        """
        if type(release) is not Release:
            raise UnprotectedRelease("What was about to be sealed does not come from the privacy boundary.")
        return self._pack(release.channel, release.take())

    def _seal(self, kind: Kind, channel: Channel, value: object) -> Sealed:
        if self.role == "client":
            if type(value) is not Release:  # what only looks like one may give its tensors twice
                raise UnprotectedRelease(f"The tensors of a {kind.name} do not come from the privacy boundary.")
            if value.channel is not channel:
                raise UnprotectedRelease(f"A release made for {value.channel} was put into a {kind.name}.")
            return self.seal(value)
        if not isinstance(value, Reply):
            raise ProtocolError(f"The tensors of a {kind.name} must be a Reply.")
        return self._pack(channel, value.tensors)

    def _pack(self, channel: Channel, tensors: Mapping[str, torch.Tensor]) -> Sealed:
        codec_name = _codec_of_bundle(tensors) if channel is Channel.UPDATE else self._codec(channel)
        specs = tuple(TensorSpec(name, codec_name, tuple(tensor.shape)) for name, tensor in tensors.items())
        pieces = [piece for tensor in tensors.values() for piece in CODECS[codec_name].encode(tensor)]
        return Sealed(channel, specs, tuple(piece.view(-1).view(torch.uint8).numpy() for piece in pieces))

    def _codec(self, channel: Channel) -> str:
        if channel not in self.codecs:
            raise ProtocolError("A tensor was about to be sent before the plan was agreed on: finish the handshake.")
        return self.codecs[channel]


def _codec_of_bundle(tensors: Mapping[str, torch.Tensor]) -> str:
    masked = bool(tensors) and all(tensor.dtype is torch.int64 for tensor in tensors.values())
    return WORDS if masked else "fp32"


def _check_own_specs(kind: Kind, specs: Sequence[TensorSpec], fields: Mapping[str, Any]) -> None:
    if any((spec.codec == WORDS) != kind.masked for spec in specs):
        raise UnprotectedRelease(
            f"The tensors of a {kind.name} must {'' if kind.masked else 'not '}be masked integers: nothing was sent."
        )
    if kind.channel is Channel.UPDATE:
        good = all(spec.name for spec in specs)
    elif not specs:
        good = kind.optional
    else:
        good = [spec.name for spec in specs] == list(kind.rows) and len(specs[0].shape) == 2
        good = good and {spec.shape for spec in specs} == {specs[0].shape}
        good = good and ("lengths" not in fields or sum(fields["lengths"]) == specs[0].shape[0])
    if not good or any(size < 1 for spec in specs for size in spec.shape):
        raise ProtocolError(f"The tensors of a {kind.name} do not have the names or shapes that the protocol asks for.")


def _cut(kind: Kind, fields: Mapping[str, Any], specs: Sequence[TensorSpec], pieces: Sequence[np.ndarray]) -> Encoded:
    payload_bytes = sum(piece.nbytes for piece in pieces)
    head = write_header(kind, fields, specs, payload_bytes)
    chunks = tuple(_chunks(head, pieces))
    return Encoded(chunks, len(head) + payload_bytes, payload_bytes, kind.name)


def _chunks(head: bytes, pieces: Sequence[np.ndarray]) -> Iterator[bytes]:
    """Cut into pieces of `CHUNK_BYTES`, with one copy of the payload."""
    parts: list[bytes | memoryview] = [head]
    room = CHUNK_BYTES - len(head)
    for piece in pieces:
        view, start = piece.data, 0
        while start < len(view):
            if not room:
                yield b"".join(parts)
                parts, room = [], CHUNK_BYTES
            part = view[start : start + room]
            parts.append(part)
            start += len(part)
            room -= len(part)
    yield b"".join(parts)


_PEER_OF: Mapping[Role | None, Role] = {"client": "server", "server": "client"}


class Decoder:
    """Turns the chunks of one stream into messages.

    Decoded tensors are float32, 64-byte aligned, finite, and nobody else's; they may be kept for any time.

    Args:
        limits: What the peer may announce; may be replaced between messages.
        role: Own side: it decides which messages may arrive. None lets both sides' pass (tools that read records).
        pool: Memory for tensors, shared by the streams of one event loop.

    Attributes:
        limits: As above.
        kind: Class name of the message that arrives, or arrived last.
        payload_bytes: Its tensors' bytes.
    """

    def __init__(self, limits: WireLimits, role: Role | None = None, pool: BufferPool | None = None) -> None:
        self.limits = limits
        self._role = role
        self._pool = pool or BufferPool()
        self._assembly: Assembly | Discarded | None = None
        self._staging = np.empty(0, dtype=np.uint8)
        self._broken = False
        self.kind = ""
        self.payload_bytes = 0

    @property
    def in_message(self) -> bool:
        """Whether a message has begun that is not complete yet."""
        return self._assembly is not None

    def feed(self, chunk: bytes) -> Message | None:
        """Take the next chunk; the message that it completes, if any.

        Raises:
            ProtocolError: The peer broke the protocol; the stream cannot be read on.
            NonFiniteMessage: A message held a NaN or an infinity and was dropped; the stream can be read on.
        """
        if self._broken:
            raise ProtocolError("This stream broke the protocol earlier and cannot be read on; open a new one.")
        try:
            return self._feed(chunk)
        except NonFiniteMessage:
            self._assembly = None
            raise
        except ProtocolError:
            self._assembly, self._broken = None, True
            raise

    def _feed(self, chunk: bytes) -> Message | None:
        view = memoryview(chunk)
        assembly = self._assembly
        if assembly is None:
            frame, start = read_header(chunk)
            assembly = self._assembly = self._begin(frame)
            view = view[start:]
        elif not view:
            raise ProtocolError("The peer sent an empty chunk in the middle of a message.")
        if len(view) > assembly.missing:
            raise ProtocolError("The peer sent more bytes than the message's header announces.")
        assembly.fill(view)
        if assembly.missing:
            return None
        message = assembly.message()
        self._assembly = None
        return message

    def _begin(self, frame: Frame) -> Assembly | Discarded:
        sender = _PEER_OF.get(self._role)
        if sender is not None and sender not in frame.kind.senders:
            raise ProtocolError(f"A {sender} must not send a {frame.kind.name}.")
        self.kind, self.payload_bytes = frame.kind.name, frame.payload_bytes
        try:
            check_frame(frame, self.limits)
        except NonFiniteMessage as error:
            return Discarded(frame, error)
        return Assembly(frame, self._pool, self._staging_for(frame))

    def _staging_for(self, frame: Frame) -> np.ndarray:
        num_bytes = sum(spec.wire_bytes for spec in frame.specs if spec.codec not in IN_PLACE)
        if len(self._staging) < num_bytes:
            self._staging = np.empty(num_bytes, dtype=np.uint8)
        return self._staging
