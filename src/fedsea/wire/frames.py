"""Frames: a fixed prefix, a small protobuf header, and the payload behind it.

    "FSEA" | version (1 byte) | 3 zero bytes | header length (uint32) | payload length (uint64) | header | payload

All numbers are little-endian. A frame is cut into chunks of at most 256 KB, one gRPC message each; the first holds the
prefix and the whole header. This file turns messages into headers and back; `checks.py` says what a header may hold,
`encoding.py` adds the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from google.protobuf.message import DecodeError

from fedsea.errors import ConfigError, ProtocolError
from fedsea.types import BlockRange, Channel
from fedsea.wire import messages as m
from fedsea.wire.codecs import CODECS, ENUM_OF_NAME, NAME_OF_ENUM
from fedsea.wire.limits import MAX_HEADER_BYTES
from fedsea.wire.proto import messages_pb2 as pb

Role: TypeAlias = Literal["client", "server"]

PROTOCOL_VERSION = 2
"""Meaning of the messages; compared in the handshake."""

FRAME_VERSION = 1
"""Layout of the bytes; stands in every prefix."""

MAGIC = b"FSEA"
PREFIX = struct.Struct("<4sB3sIQ")

_UPGRADE = "both sides need compatible versions of fedsea."
_MAX_RANK = 8
_LONGEST_NAME = 512


@dataclass(frozen=True, slots=True)
class Kind:
    """What the protocol knows about one class of messages.

    Attributes:
        cls: The class.
        field: Its name in the header.
        senders: Who may send it.
        channel: Which kind of tensors it carries, if any; a hidden state or gradient is one tensor called "",
            an update is a bundle of named tensors.
        optional: Whether it may come without any tensor.
        masked: Whether the bundle is of masked integers ("words64"), not of parameters.
        second: Channel of a second tensor of the same shape, called "gradient"; it is the message's `gradient`.
    """

    cls: type[Any]
    field: str
    senders: frozenset[Role]
    channel: Channel | None = None
    optional: bool = False
    second: Channel | None = None
    masked: bool = False

    @property
    def name(self) -> str:
        """Class name, for statistics and messages."""
        return self.cls.__name__

    @property
    def rows(self) -> Mapping[str, Channel]:
        """Name and channel of the tensors that it carries, if these are hidden states or gradients."""
        if self.channel is None or self.channel is Channel.UPDATE:
            return {}
        return {"": self.channel} if self.second is None else {"": self.channel, "gradient": self.second}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a payload."""

    name: str
    codec: str
    shape: tuple[int, ...]

    @property
    def wire_bytes(self) -> int:
        """Size in the payload."""
        return CODECS[self.codec].num_bytes(self.shape)

    @property
    def float_bytes(self) -> int:
        """Size as float32, by which tensors are limited."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Frame:
    """A header that was read; nothing in it is checked against limits yet."""

    kind: Kind
    fields: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    payload_bytes: int


def _kinds() -> dict[type[Any], Kind]:
    client: frozenset[Role] = frozenset({"client"})
    server: frozenset[Role] = frozenset({"server"})
    hidden, gradient, update = Channel.HIDDEN, Channel.GRADIENT, Channel.UPDATE
    table = (
        Kind(m.Hello, "hello", client),
        Kind(m.Welcome, "welcome", server),
        Kind(m.Join, "join", client),
        Kind(m.StepOpen, "step_open", server),
        Kind(m.Forward, "forward", client, hidden),
        Kind(m.Output, "output", server, hidden),
        Kind(m.Backward, "backward", client, gradient),
        Kind(m.InputGradient, "input_gradient", server, gradient, optional=True),
        Kind(m.Pullback, "pullback", client, hidden, second=gradient),
        Kind(m.StepReady, "step_ready", client, update, optional=True),
        Kind(m.StepDone, "step_done", server, update, optional=True),
        Kind(m.RoundOpen, "round_open", server),
        Kind(m.RoundUpdate, "round_update", client, update, optional=True),
        Kind(m.RoundResult, "round_result", server, update, optional=True),
        Kind(m.SecureKeys, "secure_keys", client),
        Kind(m.SecureRoster, "secure_roster", server),
        Kind(m.SecureShares, "secure_shares", client),
        Kind(m.SecureDelivery, "secure_delivery", server),
        Kind(m.SecureUpdate, "secure_update", client, update, masked=True),
        Kind(m.SecureSurvivors, "secure_survivors", server),
        Kind(m.SecureConsent, "secure_consent", client),
        Kind(m.SecureEvidence, "secure_evidence", server),
        Kind(m.SecureReveal, "secure_reveal", client),
        Kind(m.FetchTrunk, "fetch_trunk", client),
        Kind(m.TrunkState, "trunk_state", server, update, optional=True),
        Kind(m.SessionOpen, "session_open", client),
        Kind(m.SessionOpened, "session_opened", server),
        Kind(m.SessionForward, "session_forward", client, hidden),
        Kind(m.SessionOutput, "session_output", server, hidden, optional=True),
        Kind(m.SessionClose, "session_close", client),
        Kind(m.SessionFailed, "session_failed", server),
        Kind(m.Waiting, "waiting", server),
        Kind(m.Finished, "finished", client | server),
        Kind(m.Failure, "failure", client | server),
    )
    return {kind.cls: kind for kind in table}


KINDS: Mapping[type[Any], Kind] = _kinds()
_KIND_OF_FIELD: Mapping[str, Kind] = {kind.field: kind for kind in KINDS.values()}
_IN_PAYLOAD = frozenset({"tensors", "gradient", "plan_json"})
"""Attributes that travel behind the header."""
_REPEATED = frozenset({"lengths", "waiting_for", "held", "positions", "sources"}) | frozenset(
    {"names", "certificates", "sharing_keys", "mask_keys", "commitments", "signatures", "sealed", "shares"}
)
_FIELDS: Mapping[type[Any], tuple[str, ...]] = {
    cls: tuple(f.name for f in dataclasses.fields(cls) if f.name not in _IN_PAYLOAD) for cls in KINDS
}

_HEADER: Any = pb.Header.DESCRIPTOR
assert {
    field.name: {part.name for part in field.message_type.fields} for field in _HEADER.oneofs_by_name["kind"].fields
} == {kind.field: set(_FIELDS[cls]) for cls, kind in KINDS.items()}, "messages.proto and messages.py differ"


def fields_of(message: Any) -> dict[str, Any]:
    """The attributes that travel in the header."""
    return {name: getattr(message, name) for name in _FIELDS[type(message)]}


def write_header(kind: Kind, fields: Mapping[str, Any], specs: Sequence[TensorSpec], payload_bytes: int) -> bytes:
    """Prefix and header of a frame.

    Raises:
        ProtocolError: The header would be larger than a peer accepts.
    """
    header = pb.Header()
    part = getattr(header, kind.field)
    part.SetInParent()
    for name, value in fields.items():
        if isinstance(value, BlockRange):
            part.blocks.start, part.blocks.stop = value.start, value.stop
        elif isinstance(value, tuple):
            getattr(part, name).extend(value)
        else:
            setattr(part, name, value)
    before = ""
    for spec in specs:
        shared = _shared_length(before, spec.name)
        header.tensors.add(
            shared=shared, suffix=spec.name[shared:], codec=pb.Codec.Name(ENUM_OF_NAME[spec.codec]), shape=spec.shape
        )
        before = spec.name
    data: bytes = header.SerializeToString(deterministic=True)
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"A {kind.name} has a header of {len(data)} bytes and {MAX_HEADER_BYTES} are allowed: "
            "train fewer modules (adapter.targets in the plan), or send fewer sequences in a micro-batch."
        )
    return PREFIX.pack(MAGIC, FRAME_VERSION, b"\0\0\0", len(data), payload_bytes) + data


def read_header(chunk: bytes) -> tuple[Frame, int]:
    """The header of a frame's first chunk, and where its payload begins.

    Raises:
        ProtocolError: This is no frame, or holds what this version of the protocol does not know.
    """
    if len(chunk) < PREFIX.size or chunk[: len(MAGIC)] != MAGIC:
        raise ProtocolError(f"The peer sent something that is no fedsea frame; {_UPGRADE}")
    _, version, zeros, header_bytes, payload_bytes = PREFIX.unpack_from(chunk)
    if version != FRAME_VERSION or zeros != b"\0\0\0":
        raise ProtocolError(f"The peer sends frames of version {version}, here it is {FRAME_VERSION}; {_UPGRADE}")
    if header_bytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"A frame announces a header of {header_bytes} bytes; {MAX_HEADER_BYTES} are allowed.")
    start = PREFIX.size + header_bytes
    if len(chunk) < start:
        raise ProtocolError("A frame's first chunk ends before its header does.")
    header = pb.Header()
    try:
        header.ParseFromString(chunk[PREFIX.size : start])
    except DecodeError:
        raise ProtocolError("A frame's header is damaged.") from None
    header.DiscardUnknownFields()
    # Known fields in their one canonical form fill the header exactly; whatever is left over is unknown here.
    if header.ByteSize() != header_bytes:
        raise ProtocolError(f"A frame's header has fields that are unknown here; {_UPGRADE}")
    field = header.WhichOneof("kind")
    if field is None:
        raise ProtocolError(f"A frame holds no message that is known here; {_UPGRADE}")
    kind = _KIND_OF_FIELD[field]
    return Frame(kind, _read_fields(kind, getattr(header, field)), _read_specs(header.tensors), payload_bytes), start


def _read_fields(kind: Kind, part: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in _FIELDS[kind.cls]:
        value = getattr(part, name)
        if name == "blocks":
            try:
                value = BlockRange(value.start, value.stop)
            except ConfigError:
                raise ProtocolError(f"A {kind.name} asks for an empty or negative range of blocks.") from None
        elif name in _REPEATED:
            value = tuple(value)
        fields[name] = value
    return fields


def _read_specs(tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs, before = [], ""
    for tensor in tensors:
        if tensor.shared > len(before) or tensor.shared + len(tensor.suffix) > _LONGEST_NAME:
            raise ProtocolError("A tensor's name is damaged or too long.")
        codec = NAME_OF_ENUM.get(tensor.codec)
        if codec is None:
            raise ProtocolError(f"A tensor has the unknown codec {tensor.codec}; {_UPGRADE}")
        shape = tuple(tensor.shape)
        if len(shape) > _MAX_RANK or any(size < 1 for size in shape):
            raise ProtocolError(f"A tensor has an impossible shape: {len(shape)} axes, or one without elements.")
        before = before[: tensor.shared] + tensor.suffix
        specs.append(TensorSpec(before, codec, shape))
    return tuple(specs)


def _shared_length(before: str, name: str) -> int:
    for index, (a, b) in enumerate(zip(before, name, strict=False)):
        if a != b:
            return index
    return min(len(before), len(name))
