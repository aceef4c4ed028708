"""Messages to bytes and back, and what an encoder refuses to send."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsea.errors import ConfigError, NonFiniteError, ProtocolError, UnprotectedRelease
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel, Reply
from fedsea.wire import messages as m
from fedsea.wire.encoding import Decoder, Encoded, Encoder, Sealed
from fedsea.wire.errors import NonFiniteMessage
from fedsea.wire.frames import KINDS, PREFIX, Role, TensorSpec
from fedsea.wire.limits import CHUNK_BYTES, HANDSHAKE, MAX_HEADER_BYTES
from tests.fault import frames

CODEC_NAMES = ["fp32", "bf16", "fp16", "int8"]
TOLERANCE = {"fp32": 0.0, "bf16": 2e-2, "fp16": 2e-3, "int8": 2e-2}


def boundary() -> Boundary:
    return Boundary("trusted-server")


def feed(decoder: Decoder, chunks: tuple[bytes, ...] | list[bytes]) -> m.Message:
    *first, last = chunks
    assert all(decoder.feed(chunk) is None for chunk in first)
    message = decoder.feed(last)
    assert message is not None
    return message


def fields(message: m.Message) -> dict[str, Any]:
    return {
        f.name: getattr(message, f.name) for f in dataclasses.fields(message) if f.name not in ("tensors", "gradient")
    }


def originals(message: m.Message) -> dict[str, torch.Tensor]:
    names = {"bundle": frames.bundle(), "rows": {"": frames.hidden()}}
    kind = KINDS[type(message)]
    if kind.masked:
        return frames.words()
    return names["bundle" if kind.channel is Channel.UPDATE else "rows"]


def samples(role: Role) -> list[m.Message]:
    return frames.client_messages() if role == "client" else frames.server_messages()


ROLES: list[Role] = ["client", "server"]
CASES = [(role, index) for role in ROLES for index in range(len(samples(role)))]


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize(("role", "index"), CASES)
def test_every_message_comes_back_as_it_was(role: Role, index: int, codec: str) -> None:
    message = samples(role)[index]
    encoded = Encoder(role, frames.codecs(codec)).encode(message)
    again = feed(Decoder(frames.limits(codec), "server" if role == "client" else "client"), encoded.chunks)
    assert type(again) is type(message)
    assert fields(again) == fields(message)
    tensors = getattr(again, "tensors", {})
    for name, tensor in tensors.items():
        exact = KINDS[type(message)].channel is Channel.UPDATE
        torch.testing.assert_close(
            tensor, originals(message)[name], rtol=0.0 if exact else TOLERANCE[codec], atol=0.0 if exact else 0.02
        )
    assert encoded.num_bytes == sum(len(chunk) for chunk in encoded.chunks)
    assert encoded.kind == type(message).__name__


def test_only_masked_integers_go_into_a_secure_update_and_nowhere_else() -> None:
    encoder = Encoder("client", frames.codecs("fp32"))
    with pytest.raises(UnprotectedRelease, match="must be masked"):
        encoder.encode(m.SecureUpdate(0, 0, boundary().update({"norm.weight": torch.zeros(32)})))
    with pytest.raises(UnprotectedRelease, match="must not be masked"):
        encoder.encode(m.RoundUpdate(0, 5, boundary().maskable({}).under(lambda _: frames.words())))
    with pytest.raises(UnprotectedRelease, match="without its mask"):
        boundary().maskable(frames.bundle()).under(lambda values: values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"names": ("bank", "bank", "c")}, "twice"),
        ({"names": frames.MEMBERS[:2]}, "one entry for each"),
        ({"names": ("Bank", "law", "c")}, "field names"),
        ({"shares": frames.each(32)}, "field shares"),
    ],
)
def test_a_damaged_list_of_members_is_refused(changes: dict[str, Any], reason: str) -> None:
    good = m.SecureReveal(2, 1, frames.MEMBERS, frames.each(33))
    with pytest.raises(ProtocolError, match=reason):
        Encoder("client", {}).encode(dataclasses.replace(good, **changes))


def test_the_samples_cover_every_message() -> None:
    assert {type(message) for role in ROLES for message in samples(role)} == set(KINDS)


def test_bundles_keep_names_and_order() -> None:
    chunks = Encoder("server", {}).encode(m.RoundResult(1, Reply(frames.bundle()))).chunks
    again = feed(Decoder(frames.limits()), chunks)
    assert isinstance(again, m.RoundResult)
    assert list(again.tensors) == list(frames.BUNDLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_equal_tensors_give_equal_bytes(codec: str) -> None:
    encoder = Encoder("client", frames.codecs(codec))
    first, second = (encoder.encode(frames.forward(boundary().hidden(frames.hidden()))) for _ in range(2))
    assert first == second


def test_a_release_is_encoded_once() -> None:
    encoder, release = Encoder("client", frames.codecs("fp32")), boundary().hidden(frames.hidden())
    encoder.encode(frames.forward(release))
    with pytest.raises(UnprotectedRelease, match="sent twice"):
        encoder.encode(frames.forward(release))


def test_a_message_with_a_bad_field_does_not_use_up_its_release() -> None:
    encoder, release = Encoder("client", frames.codecs("fp32")), boundary().hidden(frames.hidden())
    with pytest.raises(ProtocolError, match="step"):
        encoder.encode(frames.forward(release, step=-5))
    assert encoder.encode(frames.forward(release)).num_bytes


@pytest.mark.parametrize("value", [{"": torch.zeros(8, 32)}, Reply({"": torch.zeros(8, 32)}), None, {}])
def test_a_client_sends_nothing_but_releases(value: object) -> None:
    with pytest.raises(UnprotectedRelease, match="privacy boundary"):
        Encoder("client", frames.codecs("fp32")).encode(frames.forward(value))


def payload() -> Sealed:
    return Encoder("client", frames.codecs("fp32")).seal(boundary().hidden(frames.hidden()))


def looks_like_one() -> SimpleNamespace:
    one = payload()
    return SimpleNamespace(channel=one.channel, specs=one.specs, pieces=one.pieces, num_rows=one.num_rows)


MADE_ELSEWHERE: dict[str, Callable[[], object]] = {
    "made": lambda: Sealed(Channel.HIDDEN, (TensorSpec("", "fp32", (1, 1)),), (np.zeros(4, np.uint8),)),
    "replaced": lambda: dataclasses.replace(payload(), pieces=(np.zeros(4, np.uint8),)),
    "copied": lambda: copy.copy(payload()),
    "deeply copied": lambda: copy.deepcopy(payload()),
    "pickled": lambda: payload().__reduce_ex__(4),
    "subclassed": lambda: type("Mine", (Sealed,), {}),
    "filled": lambda: object.__new__(Sealed).__setstate__([Channel.HIDDEN, payload().specs, payload().pieces]),
    "cut from what looks like one": lambda: Sealed.head(looks_like_one(), 1),  # type: ignore[arg-type]
    "joined with what looks like one": lambda: payload().followed_by(looks_like_one()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("make", MADE_ELSEWHERE.values(), ids=MADE_ELSEWHERE)
def test_a_payload_that_no_encoder_made_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UnprotectedRelease, match=r"only an enc|no encoder|about to be copied|no payload of an"):
        make()


def test_a_payload_cannot_be_changed_and_its_rows_can_be_cut_and_joined() -> None:
    whole = payload()
    joined = whole.head(3).followed_by(whole.head(2))
    for one in (whole, joined):
        with pytest.raises(ValueError, match="read-only"):
            one.pieces[0][:] = 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.channel = Channel.GRADIENT  # type: ignore[misc]
    assert joined.num_rows == 5
    assert joined.pieces[0].tobytes() == whole.head(3).pieces[0].tobytes() + whole.head(2).pieces[0].tobytes()


def test_rows_of_different_channels_are_not_joined() -> None:
    gradient = Encoder("client", frames.codecs("fp32")).seal(boundary().gradient(frames.hidden()))
    with pytest.raises(UnprotectedRelease, match="different kinds"):
        payload().followed_by(gradient)


def test_what_only_looks_like_a_payload_is_not_sent() -> None:
    class Looks:
        channel, specs, pieces = Channel.HIDDEN, payload().specs, payload().pieces

        @property
        def __class__(self) -> type:
            return Sealed

    with pytest.raises(UnprotectedRelease, match="privacy boundary"):
        Encoder("client", frames.codecs("fp32")).encode(frames.forward(Looks()))


def test_a_release_for_one_channel_does_not_go_out_on_another() -> None:
    with pytest.raises(UnprotectedRelease, match="gradient"):
        Encoder("client", frames.codecs("fp32")).encode(frames.forward(boundary().gradient(frames.hidden())))


def test_a_server_sends_nothing_but_replies() -> None:
    with pytest.raises(ProtocolError, match="Reply"):
        Encoder("server", frames.codecs("fp32")).encode(m.Output(1, 0, 0, False, {"": frames.hidden()}))


@pytest.mark.parametrize(
    ("role", "message"), [("server", m.FetchTrunk()), ("client", m.StepOpen(1, 0)), ("client", "hello")]
)
def test_nobody_sends_the_other_sides_messages(role: Role, message: Any) -> None:
    with pytest.raises(ProtocolError, match="does not send"):
        Encoder(role, {}).encode(message)


def test_tensors_wait_for_the_handshake() -> None:
    release = boundary().hidden(frames.hidden())
    with pytest.raises(ProtocolError, match="handshake"):
        Encoder("client", {}).encode(frames.forward(release))


def test_an_unknown_codec_is_refused_when_the_encoder_is_made() -> None:
    with pytest.raises(ConfigError, match="'zip'"):
        Encoder("client", {Channel.HIDDEN: "zip"})


@pytest.mark.parametrize(
    "message",
    [
        m.Hello(1, "a b\n"),
        m.Join("ab", 0, 0, 0),
        m.Join("ab" * 32, 0, -2, 0),
        m.Join("ab" * 32, 2**60, 0, 0),
        m.Join("ab" * 32, 0, 0, 0, "spy"),
        m.StepReady(0, 0, 0, -1.0),
        m.Failure("code", "x", 0.0, 0, True),
        m.Failure("CODE", "x" * 5000, 0.0, 0, True),
    ],
)
def test_fields_out_of_range_are_not_sent(message: m.Message) -> None:
    with pytest.raises(ProtocolError, match="does not allow"):
        Encoder("client", {}).encode(message)


def test_a_non_finite_number_is_not_sent() -> None:
    with pytest.raises(NonFiniteMessage, match="squared_norm"):
        Encoder("client", {}).encode(m.StepReady(4, 0, 6, float("nan")))


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_non_finite_output_is_not_sent_and_its_step_is_named(codec: str) -> None:
    tensor = frames.hidden()
    tensor[0, 0] = float("inf")
    with pytest.raises(NonFiniteMessage) as caught:
        Encoder("server", frames.codecs(codec)).encode(m.Output(7, 2, 1, False, Reply({"": tensor})))
    assert (caught.value.step, caught.value.attempt, caught.value.micro_batch) == (7, 2, 1)


def test_overhead_is_below_one_percent() -> None:
    lengths = (300, 212)
    release = boundary().hidden(torch.randn(512, 768))
    encoded = Encoder("client", frames.codecs("fp32")).encode(frames.forward(release, lengths=lengths))
    assert encoded.payload_bytes == 512 * 768 * 4
    assert encoded.num_bytes < 1.01 * encoded.payload_bytes
    assert max(len(chunk) for chunk in encoded.chunks) <= CHUNK_BYTES


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("size", [1, 1000, 4099, CHUNK_BYTES])
def test_the_peer_may_cut_a_payload_anywhere(codec: str, size: int) -> None:
    limits = frames.limits(codec, max_tokens=3000)
    lengths = (2000,) if size > 1 else (7,)
    release = boundary().hidden(frames.hidden(sum(lengths)))
    encoded = Encoder("client", frames.codecs(codec)).encode(frames.forward(release, lengths=lengths))
    whole, cut = Decoder(limits), Decoder(limits)
    data = b"".join(encoded.chunks)
    head = PREFIX.size + PREFIX.unpack_from(data)[3]
    pieces = [data[:head]] + [data[at : at + size] for at in range(head, len(data), size)]
    one, two = feed(whole, encoded.chunks), feed(cut, pieces)
    assert isinstance(one, m.Forward)
    assert isinstance(two, m.Forward)
    assert torch.equal(one.tensors[""], two.tensors[""])  # type: ignore[index]


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_decoded_tensors_are_aligned_float32_and_stay_as_they_are(codec: str) -> None:
    encoder = Encoder("server", frames.codecs(codec))
    decoder = Decoder(frames.limits(codec, max_tokens=3000))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in range(8):
        sent = torch.full((1500, 32), float(index))
        message = feed(decoder, encoder.encode(m.Output(index, 0, 0, False, Reply({"": sent}))).chunks)
        assert isinstance(message, m.Output)
        kept.append((message.tensors[""], sent))  # type: ignore[index]
    for received, sent in kept:
        assert received.dtype == torch.float32
        assert received.data_ptr() % 64 == 0
        torch.testing.assert_close(received, sent, rtol=0.01 if codec == "int8" else 1e-6, atol=0.0)


def with_nan(encoded: Encoded) -> list[bytes]:
    data = bytearray(encoded.chunks[0])
    data[-4:] = b"\xff\xff\xff\x7f"
    return [bytes(data)]


def test_a_message_with_nan_is_dropped_and_the_stream_goes_on() -> None:
    encoder, decoder = Encoder("client", frames.codecs("fp32")), Decoder(frames.limits(), "server")
    bad, good = (encoder.encode(frames.forward(boundary().hidden(frames.hidden()))) for _ in range(2))
    with pytest.raises(NonFiniteError, match="dropped") as caught:
        feed(decoder, with_nan(bad))
    assert isinstance(caught.value, NonFiniteMessage)
    assert (caught.value.kind, caught.value.step, caught.value.attempt) == ("Forward", 3, 1)
    assert isinstance(feed(decoder, good.chunks), m.Forward)


def test_a_header_with_nan_is_dropped_with_its_payload() -> None:
    ready = m.StepReady(3, 1, 6, 0.25, boundary().update(frames.bundle()))
    encoder, decoder = Encoder("client", {}), Decoder(frames.limits(), "server")
    bad = frames.retouched(encoder.encode(ready), squared_norm=float("nan"))
    assert decoder.feed(bad[:500]) is None
    with pytest.raises(NonFiniteMessage, match="squared_norm"):
        decoder.feed(bad[500:])
    assert isinstance(feed(decoder, encoder.encode(m.FetchTrunk()).chunks), m.FetchTrunk)


def many_tensors(count: int) -> dict[str, torch.Tensor]:
    stems = [f"model.layers.{index // 14}.self_attn.projection_{index % 14}.lora_A.weight" for index in range(count)]
    return {stem: torch.zeros(1) for stem in stems}


def test_the_adapter_of_a_model_of_100_blocks_fits_a_header() -> None:
    tensors = many_tensors(1400)
    encoded = Encoder("server", {}).encode(m.TrunkState(1, Reply(tensors)))
    limits = dataclasses.replace(frames.limits(), bundle_shapes=dict.fromkeys(tensors, (1,)))
    again = feed(Decoder(limits, "client"), encoded.chunks)
    assert isinstance(again, m.TrunkState)
    assert list(again.tensors) == list(tensors)  # type: ignore[arg-type]


def test_a_header_that_no_peer_would_accept_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match=f"{MAX_HEADER_BYTES} are allowed"):
        Encoder("server", {}).encode(m.TrunkState(1, Reply(many_tensors(9000))))


def test_before_the_handshake_no_tensor_passes() -> None:
    encoded = Encoder("client", frames.codecs("fp32")).encode(frames.forward(boundary().hidden(frames.hidden())))
    with pytest.raises(ProtocolError, match="before the plan"):
        Decoder(HANDSHAKE, "server").feed(encoded.chunks[0])


@pytest.mark.parametrize(
    ("tensors", "blocks"),
    [({"x": torch.zeros(8, 32)}, (1, 2)), ({"": torch.zeros(8)}, (1, 2)), ({"": torch.zeros(7, 32)}, (1, 2))],
)
def test_own_tensors_of_the_wrong_form_are_not_sent(tensors: dict[str, torch.Tensor], blocks: tuple[int, int]) -> None:
    encoder = Encoder("client", frames.codecs("fp32"))
    release = boundary().hidden(tensors.get("", torch.zeros(1)))
    if "x" in tensors:
        message: m.Message = m.Forward(1, 0, 0, 1, BlockRange(*blocks), (8,), 1, False, boundary().update(tensors))
        with pytest.raises(UnprotectedRelease):
            encoder.encode(message)
    else:
        with pytest.raises(ProtocolError, match="names or shapes"):
            encoder.encode(m.Forward(1, 0, 0, 1, BlockRange(*blocks), (8,), 1, False, release))
