"""Codecs: what comes out is what the type can hold, and nothing that is not finite goes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError, NonFiniteError
from fedsea.tensors import all_finite
from fedsea.wire.codecs import CODECS, WORDS, check_codec, rounded_away

NAMES = sorted(CODECS.keys() - {WORDS})


def through(name: str, tensor: torch.Tensor) -> torch.Tensor:
    raw = torch.cat([part.view(-1).view(torch.uint8) for part in CODECS[name].encode(tensor)])
    assert raw.numel() == CODECS[name].num_bytes(tuple(tensor.shape))
    out = torch.empty(tensor.shape)
    CODECS[name].decode(raw, out)
    return out


def rows(scale: float) -> torch.Tensor:
    return scale * torch.randn(7, 33, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0])
def test_fp32_is_exact(scale: float) -> None:
    assert torch.equal(through("fp32", rows(scale)), rows(scale))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_equals_torch_casts(name: str, dtype: torch.dtype) -> None:
    assert torch.equal(through(name, rows(5.0)), rows(5.0).to(dtype).float())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_values_of_the_codec_type_are_exact(name: str) -> None:
    exact = through(name, rows(1.0))
    assert torch.equal(through(name, exact), exact)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e-30, 1e30), st.integers(0, 10_000))
def test_int8_errs_by_half_a_step_of_its_row_at_most(scale: float, seed: int) -> None:
    values = scale * torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
    step = values.abs().amax(1, keepdim=True) / 127
    wider = 1 + 2.0**-7  # the scale travels as the next bfloat16
    assert bool(((through("int8", values) - values).abs() <= 0.5001 * wider * step).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_what_a_codec_says_that_it_rounds_away_is_what_it_does(name: str, scale: float) -> None:
    values = scale * torch.randn(200, 320, generator=torch.Generator().manual_seed(2))
    values[::2] *= 1.5  # another part of the way from one power of two to the next
    away = through(name, values) - values
    said_R, found_R = rounded_away(name, values), away.square().mean(dim=1)
    if name == "fp32":
        assert not said_R.any()
        assert not found_R.any()
        return
    assert float(found_R.sum() / said_R.sum()) == pytest.approx(1.0, abs=0.02)
    assert float((found_R / said_R - 1).abs().max()) < 0.4  # and of every row by itself, which has 320 values
    steps = CODECS[name].steps(values)
    assert bool((away.abs() <= 0.5001 * steps).all())
    assert float((away.abs() / steps).amax(dim=1).min()) > 0.45
    assert float(rounded_away(name, through(name, values)).sum() / said_R.sum()) == pytest.approx(1.0, abs=0.01)


def test_below_the_normal_numbers_fp16_rounds_by_steps_of_one_size() -> None:
    values = 1e-6 * torch.randn(20, 320, generator=torch.Generator().manual_seed(2))
    assert CODECS["fp16"].steps(values).unique().tolist() == [2.0**-24]
    found_R = (through("fp16", values) - values).square().mean(dim=1)
    assert float(found_R.sum() / rounded_away("fp16", values).sum()) == pytest.approx(1.0, abs=0.05)


def test_int8_costs_two_bytes_a_row_beside_its_values() -> None:
    assert CODECS["int8"].num_bytes((512, 288)) == 512 * (288 + 2)


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 3e38, -3.4e38])
def test_int8_survives_the_ends_of_the_range(value: float) -> None:
    result = through("int8", torch.full((2, 8), value))
    assert all_finite(result)
    assert float((result - value).abs().max()) <= max(abs(value) * 0.01, 2e-35)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(name: str, value: float) -> None:
    tensor = rows(1.0)
    tensor[3, 4] = value
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        CODECS[name].encode(tensor)


def test_words_come_back_bit_for_bit() -> None:
    words = torch.tensor([[0, -1, 2**63 - 1], [-(2**63), 7, 1 << 40]])
    (raw,) = CODECS[WORDS].encode(words.t())
    out = torch.empty(3, 2, dtype=torch.int64)
    CODECS[WORDS].decode(raw.view(-1).view(torch.uint8), out)
    assert torch.equal(out, words.t())
    assert CODECS[WORDS].num_bytes((2, 3)) == 48


def test_words_are_no_codec_of_a_plan() -> None:
    with pytest.raises(ConfigError, match="no codec"):
        check_codec(WORDS)


def test_fp16_overflow_advises_bf16() -> None:
    with pytest.raises(NonFiniteError, match=r"65504.*bf16"):
        CODECS["fp16"].encode(torch.full((2, 2), 70000.0))


def test_a_finite_tensor_with_an_overflowing_sum_is_finite() -> None:
    assert all_finite(torch.full((100,), 3e38))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_not_contiguous_are_encoded_by_value(name: str) -> None:
    tensor = rows(1.0).T
    assert torch.equal(through(name, tensor), through(name, tensor.contiguous()))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_input_is_accepted(name: str) -> None:
    tensor = rows(1.0).to(torch.bfloat16)
    assert torch.allclose(through(name, tensor), tensor.float(), atol=0.05)


def test_an_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fp32, bf16, fp16, int8"):
        check_codec("zip")
