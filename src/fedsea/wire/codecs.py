"""How tensors become bytes, little-endian as on every machine that torch runs on.

A codec is four methods. Every value of the protocol's `Codec` enum has one; that is checked at import.
Encoding happens on the tensor's own device, so that only the encoded bytes are copied off an accelerator.

    R  rows: tokens of a hidden state or gradient
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, get_args

import torch

from fedsea.errors import ConfigError, NonFiniteError
from fedsea.plan import CodecName
from fedsea.tensors import all_finite
from fedsea.wire.proto import messages_pb2 as pb

assert sys.byteorder == "little", "tensors travel as they lie in memory"

_LARGEST_INT8 = 127
_SMALLEST_SCALE = 1e-37
"""Rows with a smaller scale become zeros: its reciprocal is near float32's overflow."""
_LARGEST_SCALE = 2.0**121
"""Rows with a larger scale, of values beyond 3.37e38, are cut there: 127 steps that are rounded up might overflow."""


class Codec(Protocol):
    """One way to write a tensor."""

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape."""
        ...

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Contiguous CPU tensors whose bytes, one after the other, are the encoding.

        Raises:
            NonFiniteError: A value is NaN or infinite, or does not fit the codec.
        """
        ...

    def decode(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Write the values of `raw` (uint8, one axis) into `out` (float32, of the tensor's shape)."""
        ...

    def steps(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """How far apart [R, H] the values are that can be carried where those of these rows lie; see `rounded_away`."""
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """Values as they are, in another floating-point type."""

    dtype: torch.dtype

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec`."""
        return self.dtype.itemsize * math.prod(shape)

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        encoded = tensor.detach().to(self.dtype)
        if not all_finite(encoded):
            if self.dtype is torch.float16 and all_finite(tensor.detach()):
                raise NonFiniteError(
                    "A value is beyond 65504, the largest that the fp16 codec can carry: "
                    'set the plan\'s wire codec to "bf16", which has the range of float32.'
                )
            raise NonFiniteError("A tensor that was about to be sent holds a NaN or an infinity.")
        return (encoded.to("cpu").contiguous(),)

    def decode(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """See `Codec`."""
        out.copy_(raw.view(self.dtype).view(out.shape))

    def steps(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        limits = torch.finfo(self.dtype)
        sizes_RH = rows_RH.float().abs().clamp(min=limits.tiny)
        return sizes_RH * limits.eps / (2 * torch.frexp(sizes_RH).mantissa)  # alike from one power of two to the next


@dataclass(frozen=True, slots=True)
class Int8:
    """Eight bits a value: every row over its largest magnitude; the rows' bfloat16 scales come first.

    Rounded up, a scale makes steps that are wider by less than 0.8 %, and no value leaves the range.
    """

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec`."""
        return 2 * shape[0] + math.prod(shape)

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        values_RH = tensor.detach().to(torch.float32)
        short_R = self._scales(values_RH)
        scales_R = short_R.to(torch.float32)
        factors_R = torch.where(scales_R > 0, 1 / scales_R, 0.0)
        rows_RH = (values_RH * factors_R[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
        return short_R.to("cpu").contiguous(), rows_RH.to("cpu").contiguous()

    def decode(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """See `Codec`."""
        num_rows = out.shape[0]
        scales_R = raw[: 2 * num_rows].view(torch.bfloat16).to(torch.float32)
        torch.mul(raw[2 * num_rows :].view(torch.int8).view(out.shape), scales_R[:, None], out=out)

    def steps(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        return self._scales(rows_RH.float()).to(torch.float32)[:, None].expand(rows_RH.shape)

    def _scales(self, values_RH: torch.Tensor) -> torch.Tensor:
        """Of every row, in bfloat16."""
        scales_R = torch.linalg.vector_norm(values_RH, ord=torch.inf, dim=1) / _LARGEST_INT8
        if not all_finite(scales_R):
            raise NonFiniteError("A tensor that was about to be sent holds a NaN or an infinity.")
        return _rounded_up(torch.where(scales_R < _SMALLEST_SCALE, 0.0, scales_R.clamp(max=_LARGEST_SCALE)))


def _rounded_up(scales_R: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 for each of these, which are not negative: bfloat16 is the upper half of float32."""
    return ((scales_R.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Words64:
    """Integers mod 2^64 as they are: what secure aggregation sends. No codec of hidden states or gradients."""

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec`."""
        return 8 * math.prod(shape)

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        assert tensor.dtype is torch.int64
        return (tensor.to("cpu").contiguous(),)

    def decode(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """See `Codec`; `out` is int64."""
        out.copy_(raw.view(torch.int64).view(out.shape))

    def steps(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        return torch.ones(rows_RH.shape, device=rows_RH.device)


WORDS = "words64"
IN_PLACE = frozenset({"fp32", WORDS})
"""Codecs whose bytes are the tensor's own: they are received where they stay."""

CODECS: Mapping[str, Codec] = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int8(),
    WORDS: Words64(),
}
ENUM_OF_NAME: Mapping[str, int] = {name: pb.Codec.Value(f"CODEC_{name.upper()}") for name in CODECS}
NAME_OF_ENUM: Mapping[int, str] = {value: name for name, value in ENUM_OF_NAME.items()}

assert set(NAME_OF_ENUM) | {pb.CODEC_UNSPECIFIED} == set(pb.Codec.values()), "a codec of the protocol is missing"
assert set(CODECS) - {WORDS} == set(get_args(CodecName)), "the plan's codecs and the wire's differ"


def check_codec(name: str) -> str:
    """Return `name` if there is such a codec.

    Raises:
        ConfigError: There is none.
    """
    if name not in get_args(CodecName):
        raise ConfigError(f"There is no codec {name!r}; use one of {', '.join(get_args(CodecName))}.")
    return name


def rounded_away(name: str, rows_RH: torch.Tensor) -> torch.Tensor:
    """Variance [R] of what a codec rounds away of a value of each row: a twelfth of the square of its steps.

    Args:
        name: Of the codec. What carries float32 as it is rounds nothing away, though its values lie steps apart too.
        rows_RH: Values, or what was decoded of them.
    """
    if name in IN_PLACE:
        return torch.zeros(rows_RH.shape[0], device=rows_RH.device)
    return CODECS[name].steps(rows_RH).square().mean(dim=1) / 12


def as_decoded(name: str, rows_RH: torch.Tensor) -> torch.Tensor:
    """Float32 rows as a receiver has them, on the CPU.

    Raises:
        NonFiniteError: See `Codec.encode`.
    """
    codec, decoded_RH = CODECS[name], torch.empty(rows_RH.shape)
    codec.decode(torch.cat([part.view(torch.uint8).flatten() for part in codec.encode(rows_RH)]), decoded_RH)
    return decoded_RH
