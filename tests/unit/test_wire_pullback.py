"""The one message with two tensors: each by its own codec, and refused before anything is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsea.errors import ProtocolError, UnprotectedRelease
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel
from fedsea.wire import messages as m
from fedsea.wire.encoding import Decoder, Encoder
from tests.fault import frames
from tests.unit.test_wire_limits import refused

BOUNDARY = Boundary("trusted-server")


def _pullback(encoder: Encoder, gradient: torch.Tensor | None = None) -> m.Pullback:
    back = BOUNDARY.gradient(frames.hidden() * 2.0 if gradient is None else gradient)
    return m.Pullback(3, 0, BlockRange(1, 3), frames.LENGTHS, encoder.seal(BOUNDARY.hidden(frames.hidden())), back)


def test_each_tensor_comes_back_by_its_own_codec() -> None:
    codecs = {Channel.HIDDEN: "fp32", Channel.GRADIENT: "bf16"}
    encoder = Encoder("client", codecs)
    decoder = Decoder(replace(frames.limits(), codecs=codecs), "server")
    *first, last = encoder.encode(_pullback(encoder)).chunks
    assert all(decoder.feed(chunk) is None for chunk in first)
    again = decoder.feed(last)
    assert isinstance(again, m.Pullback)
    assert torch.equal(again.tensors[""], frames.hidden())  # type: ignore[index]
    assert torch.equal(again.gradient[""], (frames.hidden() * 2.0).bfloat16().float())  # type: ignore[index]


def test_gradient_needs_the_boundary_and_the_shape_of_its_hidden_states() -> None:
    encoder = Encoder("client", frames.codecs("fp32"))
    with pytest.raises(ProtocolError, match="names or shapes"):
        encoder.encode(_pullback(encoder, frames.hidden(5)))
    bare = m.Pullback(3, 0, BlockRange(1, 3), frames.LENGTHS, BOUNDARY.hidden(frames.hidden()), {"": frames.hidden()})
    with pytest.raises(UnprotectedRelease, match="privacy boundary"):
        encoder.encode(bare)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tensors__shape": (6, frames.HIDDEN_SIZE)}, "bytes of payload|another shape"),
        ({"tensors__shape": (80, frames.HIDDEN_SIZE)}, "80 tokens"),
        ({"tensors__suffix": "x"}, "misnamed"),
        ({"lengths": (8, 0)}, "empty sequence"),
        ({"lengths": (5, 4)}, "sum to 9"),
        ({"blocks__stop": 7}, "of a model of 6"),
        ({"step": -1}, "step"),
    ],
)
def test_pullback_out_of_bounds_is_refused(changes: dict[str, object], match: str) -> None:
    encoder = Encoder("client", frames.codecs("fp32"))
    refused(frames.retouched(encoder.encode(_pullback(encoder)), **changes), match)
