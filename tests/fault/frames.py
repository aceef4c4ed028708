"""Sample messages of every kind, and hostile frames made from nothing or from real ones.

The strategies yield lists of chunks, as a peer would write them to a stream.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from random import Random

import grpc
import torch
from hypothesis import strategies as st

from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel, Reply
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoded, Encoder
from fedsea.wire.frames import KINDS, PREFIX, Role
from fedsea.wire.limits import WireLimits
from fedsea.wire.proto import messages_pb2 as pb
from fedsea.wire.transport import DEFAULT_TIMING, SESSION, client_options

HIDDEN_SIZE = 32
LENGTHS = (5, 3)
BUNDLE = {"layers.1.q_proj.lora_A.weight": (4, 32), "layers.1.q_proj.lora_B.weight": (32, 4), "norm.weight": (32,)}


MASKED = {"norm.weight": (32,), "weights": (1,)}
MEMBERS = ("bank", "law-office", "clinic.2")


def codecs(name: str) -> dict[Channel, str]:
    return {Channel.HIDDEN: name, Channel.GRADIENT: name}


SOURCES = tuple(range(len(LENGTHS)))[::-1]


def limits(codec: str = "fp32", *, max_tokens: int = 64, hidden_size: int = HIDDEN_SIZE) -> WireLimits:
    return WireLimits(
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        max_sequences=8,
        max_tensor_bytes=4 * max_tokens * hidden_size,
        codecs=codecs(codec),
        bundle_shapes=BUNDLE,
        num_blocks=6,
        masked_shapes=MASKED,
    )


def hidden(num_rows: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(num_rows))


def bundle() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in BUNDLE.items()}


def words() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randint(-(2**63), 2**63 - 1, shape, generator=generator) for name, shape in MASKED.items()}


def each(size: int) -> tuple[bytes, ...]:
    """Something of a size for every member."""
    return tuple(bytes([index]) * size for index in range(len(MEMBERS)))


def forward(tensors: object, step: int = 3, lengths: tuple[int, ...] = LENGTHS) -> m.Forward:
    return m.Forward(step, 1, 0, 2, BlockRange(1, 5), lengths, 6, False, tensors)  # type: ignore[arg-type]


def client_messages() -> list[m.Message]:
    """One message of every kind that a client sends, with fresh releases."""
    boundary = Boundary("trusted-server")
    return [
        m.Hello(1, "0.1.0"),
        m.Join("ab" * 32, 4, -1, 2, "train"),
        forward(boundary.hidden(hidden())),
        m.Backward(3, 1, 0, boundary.gradient(hidden())),
        m.StepReady(3, 1, 6, 0.25, boundary.update(bundle())),
        m.StepReady(3, 1, 6, 0.25),
        m.RoundUpdate(2, 100, boundary.update(bundle())),
        m.SecureKeys(2, 1, b"c" * 500, b"s" * 32, b"m" * 32, b"h" * 32, b"g" * 71),
        m.SecureShares(2, 1, MEMBERS, each(82)),
        m.SecureUpdate(2, 1, boundary.maskable(bundle()).under(lambda _: words())),
        m.SecureConsent(2, 1, b"g" * 70),
        m.SecureReveal(2, 1, MEMBERS, each(33)),
        m.FetchTrunk(),
        m.Pullback(3, 0, BlockRange(1, 3), LENGTHS, boundary.hidden(hidden()), boundary.gradient(hidden())),
        m.SessionOpen(3, 2**52, 2, 100, BlockRange(1, 3)),
        m.SessionForward(
            3, 0, (0,) * len(LENGTHS), LENGTHS, tuple(range(len(LENGTHS)))[::-1], False, boundary.hidden(hidden())
        ),
        m.SessionClose(3, 7),
        m.Finished(9),
        m.Failure("CONFIG", "Say what to do.", 0.0, -1, True),
    ]


def server_messages() -> list[m.Message]:
    """One message of every kind that a server sends."""
    return [
        m.Welcome('{"name": "prüfung"}' * 40000, "cd" * 32, "run-1"),
        m.StepOpen(3, 1),
        m.Output(3, 1, 0, False, Reply({"": hidden()})),
        m.InputGradient(3, 1, 0, Reply({"": hidden()})),
        m.InputGradient(3, 1, 0),
        m.InputGradient(3, 0, 0, Reply({"": hidden()}), evaluate=True),
        m.StepDone(3, 12, 0.5, Reply(bundle())),
        m.RoundOpen(2),
        m.RoundResult(2, Reply(bundle())),
        m.RoundOpen(2, 3),
        m.SecureRoster(2, 1, MEMBERS, each(500), each(32), each(32), each(32), each(71)),
        m.SecureDelivery(2, 1, MEMBERS[:1], each(82)[:1]),
        m.SecureSurvivors(2, 1, MEMBERS),
        m.SecureEvidence(2, 1, MEMBERS, each(71)),
        m.TrunkState(4, Reply(bundle())),
        m.SessionOpened(3, (0, 7), 12, 60.0),
        m.SessionOutput(3, 5, Reply({"": hidden()})),
        m.SessionOutput(3, 6),
        m.SessionFailed(3, "CAPACITY", "Try later.", 2.5),
        m.Waiting(4, ("bank", "law-office")),
        m.Finished(9),
        m.Failure("CAPACITY", "Try later.", 2.5, 3, False),
    ]


def encoded(codec: str = "fp32", role: Role = "client") -> list[Encoded]:
    encoder = Encoder(role, codecs(codec))
    return [encoder.encode(message) for message in (client_messages() if role == "client" else server_messages())]


def frame(header: bytes, payload: bytes = b"", *, payload_bytes: int | None = None, version: int = 1) -> bytes:
    """A frame with a given header; `payload_bytes` may lie."""
    size = len(payload) if payload_bytes is None else payload_bytes
    return PREFIX.pack(b"FSEA", version, b"\0\0\0", len(header), size) + header + payload


def retouched(original: Encoded, **changes: object) -> bytes:
    """A real one-chunk frame whose protobuf header was changed; `tensors__shape=(…)` changes the first tensor."""
    (chunk,) = original.chunks
    _, _, _, header_bytes, payload_bytes = PREFIX.unpack_from(chunk)
    header = pb.Header.FromString(chunk[PREFIX.size : PREFIX.size + header_bytes])
    part = getattr(header, header.WhichOneof("kind"))
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        target = header.tensors[0] if owner == "tensors" else getattr(part, owner) if owner else part
        if isinstance(value, tuple):
            del getattr(target, name)[:]
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
    payload = chunk[PREFIX.size + header_bytes :]
    return frame(header.SerializeToString(), payload, payload_bytes=payload_bytes)


_INTEGERS = st.sampled_from([-(2**63), -2, -1, 0, 1, 2, 3, 5, 8, 32, 64, 65, 2**20, 2**31, 2**40, 2**53, 2**63 - 1])
_FLOATS = st.sampled_from([0.0, -1.0, 0.5, float("nan"), float("inf"), 1e308])
_TEXTS = st.sampled_from(["", "train", "ab" * 32, "CONFIG", "run-1", "0.1", "\x1b[2J", "x" * 5000, *BUNDLE])
_BYTES = st.sampled_from([b"", b"k" * 32, b"s" * 33, b"s" * 82, b"g" * 71, b"c" * 500, b"x" * 5000])
_KIND_NAMES = st.sampled_from(sorted(kind.field for kind in KINDS.values()))


def _value(field: object) -> st.SearchStrategy[object]:
    if field.type == field.TYPE_BYTES:  # type: ignore[attr-defined]
        return _BYTES
    kind = field.cpp_type  # type: ignore[attr-defined]
    if kind == field.CPPTYPE_STRING:  # type: ignore[attr-defined]
        return _TEXTS
    if kind == field.CPPTYPE_DOUBLE:  # type: ignore[attr-defined]
        return _FLOATS
    if kind == field.CPPTYPE_BOOL:  # type: ignore[attr-defined]
        return st.booleans()
    return _INTEGERS


@st.composite
def built(draw: st.DrawFn) -> list[bytes]:
    """Well-formed protobuf headers with any values, before payloads of right and wrong lengths."""
    header = pb.Header()
    part = getattr(header, draw(_KIND_NAMES))
    part.SetInParent()
    for field in part.DESCRIPTOR.fields:
        if field.message_type is not None:
            part.blocks.start, part.blocks.stop = draw(_INTEGERS), draw(_INTEGERS)
        elif field.is_repeated:
            getattr(part, field.name).extend(draw(st.lists(_value(field), max_size=10)))
        else:
            setattr(part, field.name, draw(_value(field)))
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(_INTEGERS, max_size=3)) if draw(st.booleans()) else [8, HIDDEN_SIZE]
        shared = draw(st.sampled_from([0, 0, 0, 5, 2**32 - 1]))
        header.tensors.add(shared=shared, suffix=draw(_TEXTS), codec=draw(st.integers(-1, 9)), shape=shape)
    payload = bytes(draw(st.sampled_from([0, 1, 256, 1024, 8 * HIDDEN_SIZE * 4])))
    announced = draw(st.sampled_from([len(payload), 0, 1024, 2**32, 2**64 - 1]))
    return [frame(header.SerializeToString(), payload, payload_bytes=announced)]


@st.composite
def noise(draw: st.DrawFn) -> list[bytes]:
    """Random bytes, bare or behind a correct prefix."""
    data = draw(st.binary(max_size=300))
    if draw(st.booleans()):
        return [data]
    header_bytes = draw(st.sampled_from([len(data), 0, len(data) + 1, 65536, 65537, 2**32 - 1]))
    prefix = struct.pack(
        "<4sB3sIQ", b"FSEA", draw(st.sampled_from([1, 1, 1, 0, 2])), b"\0\0\0", header_bytes, len(data)
    )
    return [prefix + data]


_REAL = [list(one.chunks) for codec in ("fp32", "bf16", "fp16", "int8") for one in encoded(codec)]
_REAL += [list(one.chunks) for one in encoded("fp32", "server")[1:]]


def mutate(random: Random, real: Sequence[list[bytes]] = _REAL) -> list[bytes]:
    """A real frame with bytes changed, cut out, put in, or sent twice."""
    chunks = [bytearray(chunk) for chunk in random.choice(real)]
    for _ in range(random.randint(1, 4)):
        chunk = random.choice(chunks)
        # Mostly near the front, where prefix and header are.
        at = random.randint(0, min(len(chunk), 120 if random.randint(0, 1) else len(chunk)))
        how = random.choice(["flip", "flip", "set", "cut", "insert", "end", "twice"])
        if how == "flip" and at < len(chunk):
            chunk[at] ^= 1 << random.randint(0, 7)
        elif how == "set" and at < len(chunk):
            chunk[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif how == "cut":
            del chunk[at : at + random.randint(1, 16)]
        elif how == "insert":
            chunk[at:at] = bytes(random.randint(0, 255) for _ in range(random.randint(1, 16)))
        elif how == "end":
            del chunk[at:]
        else:
            chunks.append(bytearray(chunk))
    return [bytes(chunk) for chunk in chunks]


def mutated(real: Sequence[list[bytes]] = _REAL) -> st.SearchStrategy[list[bytes]]:
    """The same, of hypothesis's choices."""
    return st.builds(mutate, st.randoms(use_true_random=False), st.just(real))


def made() -> st.SearchStrategy[list[bytes]]:
    """Frames made from nothing."""
    return st.one_of(noise(), built())


def hostile() -> st.SearchStrategy[list[bytes]]:
    """All of the above."""
    return st.one_of(made(), mutated())


class Thrower:
    """Writes raw chunks to a server, as a client with a good certificate and bad intentions would."""

    def __init__(self, address: str, identity: object) -> None:
        self._address = address
        self._identity = identity

    async def __aenter__(self) -> Thrower:
        own = self._identity
        credentials = grpc.ssl_channel_credentials(own.ca_pem, own.key_pem, own.certificate_pem)  # type: ignore[attr-defined]
        options = [*client_options(DEFAULT_TIMING, proxy=False), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def throw(self, chunks: Sequence[bytes], timeout_s: float = 30.0) -> grpc.StatusCode:
        """Open a stream, write the chunks, end it; how the server ended it.

        CANCELLED stands for a stream that the server had ended before the last chunk was written: gRPC then replaces
        the server's status by one of its own.
        """
        call = self._channel.stream_stream(SESSION)()
        try:
            async with asyncio.timeout(timeout_s):
                reading = asyncio.create_task(_read_to_the_end(call))
                try:
                    for chunk in chunks:
                        await call.write(chunk)
                    await call.done_writing()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    pass
                await reading
                late = await call.details() == "Internal error from Core"
                return grpc.StatusCode.CANCELLED if late else await call.code()
        finally:
            call.cancel()


async def _read_to_the_end(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
