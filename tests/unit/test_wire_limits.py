"""What a decoder refuses, before it allocates anything."""

from __future__ import annotations

import dataclasses

import pytest

from fedsea.errors import ProtocolError
from fedsea.privacy.boundary import Boundary
from fedsea.types import Reply
from fedsea.wire import messages as m
from fedsea.wire.buffers import BufferPool
from fedsea.wire.encoding import Decoder, Encoded, Encoder
from fedsea.wire.proto import messages_pb2 as pb
from tests.fault import frames


class NoMemory(BufferPool):
    """Any allocation is a failure of the test."""

    def empty(self, shape: tuple[int, ...]) -> object:  # type: ignore[override]
        raise AssertionError(f"allocated {shape}")


def refused(chunk: bytes, match: str, **limits: object) -> None:
    decoder = Decoder(dataclasses.replace(frames.limits(), **limits), "server", NoMemory())  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=match):
        decoder.feed(chunk)
    with pytest.raises(ProtocolError, match="cannot be read on"):
        decoder.feed(chunk)


def forward(codec: str = "fp32") -> Encoded:
    release = Boundary("trusted-server").hidden(frames.hidden())
    return Encoder("client", frames.codecs(codec)).encode(frames.forward(release))


def update() -> Encoded:
    release = Boundary("trusted-server").update(frames.bundle())
    return Encoder("client", {}).encode(m.RoundUpdate(1, 5, release))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lengths": (5, 4)}, "lengths sum to 9"),
        ({"lengths": (9, -1)}, "field lengths"),
        ({"lengths": (8, 0)}, "empty one"),
        ({"lengths": ()}, "lengths sum to 0"),
        ({"lengths": (1,) * 9}, "9 sequences"),
        ({"num_target_tokens": 9}, "more target tokens"),
        ({"num_target_tokens": -1}, "num_target_tokens"),
        ({"step": -1}, "step"),
        ({"step": 2**60}, "step"),
        ({"attempt": -1}, "attempt"),
        ({"micro_batch": 2}, "num_micro_batches"),
        ({"blocks__start": 5}, "negative range"),
        ({"blocks__start": -1}, "negative range"),
        ({"blocks__stop": 7}, "1:7 of a model of 6"),
        ({"tensors__codec": pb.CODEC_BF16}, "codec bf16; the plan says fp32"),
        ({"tensors__codec": pb.CODEC_UNSPECIFIED}, "unknown codec"),
        ({"tensors__codec": 77}, "unknown codec 77"),
        ({"tensors__suffix": "x"}, "single one"),
        ({"tensors__shared": 3}, "name is damaged"),
        ({"tensors__shape": (8, 31)}, r"must be \(tokens, 32\)"),
        ({"tensors__shape": (256,)}, r"must be \(tokens, 32\)"),
        ({"tensors__shape": (1, 8, 32)}, r"must be \(tokens, 32\)"),
        ({"tensors__shape": (8, -32)}, "impossible shape"),
        ({"tensors__shape": (0, 32)}, "impossible shape"),
        ({"tensors__shape": (1,) * 9}, "impossible shape"),
        ({"tensors__shape": (2**62, 32)}, "tokens; 64 are allowed"),
        ({"tensors__shape": (16, 32)}, "bytes of payload"),
    ],
)
def test_a_forward_out_of_bounds_is_refused(changes: dict[str, object], match: str) -> None:
    refused(frames.retouched(forward(), **changes), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tensors__suffix": "x" * 29}, "plan does not name"),
        ({"tensors__shape": (4, 33)}, "must be"),
        ({"tensors__codec": pb.CODEC_FP16}, "travel as fp32"),
        ({"num_target_tokens": -1}, "num_target_tokens"),
    ],
)
def test_an_update_out_of_bounds_is_refused(changes: dict[str, object], match: str) -> None:
    refused(frames.retouched(update(), **changes), match)


def test_a_tensor_twice_in_a_bundle_is_refused() -> None:
    header = pb.Header(round_update=pb.RoundUpdate(round=1))
    for shared in (0, 11):
        header.tensors.add(shared=shared, suffix="norm.weight"[shared:], codec=pb.CODEC_FP32, shape=[32])
    refused(frames.frame(header.SerializeToString(), bytes(256)), "twice")


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"hidden_size": None}, "before the plan"),
        ({"max_tokens": 7}, "8 tokens; 7 are allowed"),
        ({"max_sequences": 1}, "2 sequences; 1 are allowed"),
        ({"max_tensor_bytes": 1023}, "1024 bytes; 1023 are allowed"),
        ({"codecs": frames.codecs("int8")}, "plan says int8"),
        ({"num_blocks": 4}, "model of 4 blocks"),
    ],
)
def test_each_limit_is_applied(limits: dict[str, object], match: str) -> None:
    refused(forward().chunks[0], match, **limits)


@pytest.mark.parametrize(
    ("chunk", "match"),
    [
        (b"", "no fedsea frame"),
        (b"GET / HTTP/1.1\r\n\r\n", "no fedsea frame"),
        (frames.frame(b"", version=9), "version 9"),
        (frames.frame(b""), "no message"),
        (frames.frame(b"\xff\xff\xff"), "damaged"),
        (frames.frame(b"\x08\x01\xa2\x06\x00"), "damaged|unknown"),
        (frames.frame(pb.Header(fetch_trunk=pb.FetchTrunk()).SerializeToString() + b"\x98\x06\x01"), "unknown"),
        (frames.frame(b"\0" * 70000), "65536 are allowed"),
        (frames.frame(pb.Header(fetch_trunk=pb.FetchTrunk()).SerializeToString())[:-1], "ends before its header"),
        (frames.frame(pb.Header(fetch_trunk=pb.FetchTrunk()).SerializeToString(), b"x"), "tensors take 0"),
        (frames.frame(pb.Header(step_open=pb.StepOpen()).SerializeToString()), "client must not send a StepOpen"),
        (frames.frame(pb.Header(backward=pb.Backward()).SerializeToString()), "carries no tensor"),
        (frames.frame(pb.Header(hello=pb.Hello(software_version="é" * 9)).SerializeToString()), "software_version"),
    ],
)
def test_what_is_no_frame_is_refused(chunk: bytes, match: str) -> None:
    refused(chunk, match)


def test_a_tensor_in_a_message_without_tensors_is_refused() -> None:
    header = pb.Header(fetch_trunk=pb.FetchTrunk())
    header.tensors.add(codec=pb.CODEC_FP32, shape=[8, 32])
    refused(frames.frame(header.SerializeToString(), bytes(1024)), "must have none")


def test_more_bytes_than_announced_are_refused() -> None:
    decoder = Decoder(frames.limits(), "server")
    with pytest.raises(ProtocolError, match="more bytes"):
        decoder.feed(forward().chunks[0] + b"x")


def test_an_empty_chunk_inside_a_message_is_refused() -> None:
    decoder = Decoder(frames.limits(), "server")
    assert decoder.feed(forward().chunks[0][:-5]) is None
    with pytest.raises(ProtocolError, match="empty chunk"):
        decoder.feed(b"")


def test_a_plan_beyond_its_limit_is_refused() -> None:
    header = pb.Header(welcome=pb.Welcome(plan_sha256="ab" * 32, run_id="r"))
    with pytest.raises(ProtocolError, match="plan of 99999999 bytes"):
        Decoder(frames.limits(), "client").feed(frames.frame(header.SerializeToString(), payload_bytes=99999999))


def test_a_plan_that_is_no_text_is_refused() -> None:
    header = pb.Header(welcome=pb.Welcome(plan_sha256="ab" * 32, run_id="r"))
    with pytest.raises(ProtocolError, match="not text"):
        Decoder(frames.limits(), "client").feed(frames.frame(header.SerializeToString(), b"\xff\xfe"))


def test_errors_about_bundles_name_no_text_of_the_peer() -> None:
    decoder = Decoder(frames.limits(), "server")
    with pytest.raises(ProtocolError) as caught:
        decoder.feed(frames.retouched(update(), tensors__suffix="John".ljust(29)))
    assert "John" not in caught.value.message


def test_replaced_limits_hold_from_the_next_message_on() -> None:
    decoder = Decoder(frames.limits(), "client")
    encoder = Encoder("server", frames.codecs("fp32"))
    output = encoder.encode(m.Output(1, 0, 0, False, Reply({"": frames.hidden()})))
    assert decoder.feed(output.chunks[0]) is not None
    decoder.limits = frames.limits(max_tokens=4)
    with pytest.raises(ProtocolError, match="4 are allowed"):
        decoder.feed(output.chunks[0])
