"""Noise as planned never looks at fault, however narrow rows are, and noise that is missing or comes again does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fedsea.audit import noise_rows
from fedsea.audit.noise_rows import Added, can_be_compared, shared, uneven, used_twice
from fedsea.wire.codecs import as_decoded

STD = 2.0
Make = Callable[[int, int], torch.Tensor]


def _draw(seed: int) -> Make:
    generator = torch.Generator().manual_seed(seed)
    return lambda rows, width: torch.randn(rows, width, generator=generator)


def _added(noise_RH: torch.Tensor, raw_RH: torch.Tensor, codec: str = "fp32") -> Added:
    return Added.of(as_decoded(codec, raw_RH + STD * noise_RH), raw_RH, STD, codec)


def _releases(width: int, noise: Callable[[int, Make], torch.Tensor], codec: str = "fp32") -> list[Added]:
    """A prompt of 20 rows and then answers' rows, one by one; twelve times."""
    draw = _draw(width)
    lengths = [20, *[1] * 8] * 12
    return [_added(noise(rows, draw), 10 * draw(rows, width), codec) for rows in lengths]


@pytest.mark.parametrize("width", [16, 32, 64, 256])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_independent_noise_is_never_called_the_same_or_uneven(width: int, codec: str) -> None:
    releases = _releases(width, lambda rows, draw: draw(rows, width), codec)
    assert can_be_compared(releases)
    assert not used_twice(releases)
    assert uneven(releases, STD) == []
    assert not shared(releases[:40], releases[40:])


def test_many_audits_of_a_narrow_model_give_no_false_alarm() -> None:
    """At 64 columns a fixed limit of 0.5 calls one of twenty such audits broken."""
    draw = _draw(0)
    for _ in range(60):
        releases = [_added(draw(rows, 64), torch.zeros(rows, 64)) for rows in [20, *[1] * 8] * 12]
        assert not used_twice(releases)
        assert uneven(releases, STD) == []


@pytest.mark.parametrize(("width", "codec"), [(16, "fp32"), (32, "fp32"), (64, "fp32"), (64, "int8"), (64, "bf16")])
def test_noise_that_begins_anew_in_every_release_is_seen(width: int, codec: str) -> None:
    assert used_twice(_releases(width, lambda rows, _: _draw(7)(rows, width), codec))


@pytest.mark.parametrize("width", [16, 64])
def test_one_row_of_noise_for_all_rows_of_a_release_is_seen(width: int) -> None:
    raw = _draw(1)
    whole = [_added(raw(1, width).expand(40, width), raw(40, width)) for _ in range(8)]
    assert used_twice(whole)
    far = [_added(torch.cat([noise := raw(30, width), noise[-1:]]), raw(31, width)) for _ in range(200)]
    assert used_twice(far)  # also behind the rows that releases are compared by


def _texts(draw: Make, again: tuple[int, torch.Tensor] | None = None) -> list[Added]:
    """144 releases of 96 rows, as in an audit without --quick; one of them may have noise that is given."""
    noise = [draw(96, 64) for _ in range(144)]
    if again is not None:
        noise[again[0]] = again[1]
    return [_added(noise_RH, draw(96, 64)) for noise_RH in noise]


def test_noise_that_comes_again_anywhere_in_many_long_texts_is_seen() -> None:
    draw = _draw(3)
    first_RH, second_RH = draw(96, 64), draw(96, 64)
    second_RH[20:76] = first_RH[40:]
    releases = _texts(draw, (7, first_RH))
    assert not used_twice(releases)
    releases[100] = _added(second_RH, draw(96, 64))
    assert used_twice(releases)
    assert shared([_added(first_RH[50:90], draw(40, 64))], releases)
    assert shared(releases, [_added(draw(96, 64), draw(96, 64)), _added(second_RH, draw(96, 64))])
    assert not shared(releases, [_added(draw(96, 64), draw(96, 64))])


def test_of_more_rows_than_can_be_compared_some_are_taken_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_rows, "_MOST_WORK", 64 * 3000**2)
    draw = _draw(4)
    first_RH, second_RH = draw(96, 64), draw(96, 64)
    second_RH[:70] = first_RH[26:]
    releases = _texts(draw, (7, first_RH))
    assert not used_twice(releases)
    releases[100] = _added(second_RH, draw(96, 64))
    assert used_twice(releases)


def test_rows_without_noise_among_rows_with_more_are_seen() -> None:
    def every_other(rows: int, draw: Make) -> torch.Tensor:
        noise_RH = math.sqrt(2) * draw(rows, 64)
        noise_RH[1::2] = 0.0
        return noise_RH

    off = uneven(_releases(64, every_other), STD)
    assert len(off) >= 12 * 10
    assert min(off) == 0.0


def test_noise_in_some_columns_alone_is_seen() -> None:
    draw = _draw(0)
    half_H = (torch.arange(64) < 32) * math.sqrt(2)
    assert min(uneven([_added(draw(40, 64) * half_H, draw(40, 64)) for _ in range(8)], STD)) == 0.0


def test_noise_of_hidden_states_that_comes_again_on_gradients_is_seen() -> None:
    draw = _draw(0)
    noise = [draw(20, 64) for _ in range(6)]
    hidden, gradients = ([_added(rows_RH, draw(20, 64)) for rows_RH in noise] for _ in range(2))
    assert shared(hidden, gradients)
    assert not shared(hidden, [_added(draw(20, 32), draw(20, 32))])


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_rows_that_have_no_noise_have_none_that_comes_again(codec: str) -> None:
    """Equal values are rounded alike, so that what was added to them is the same."""
    draw = _draw(0)
    raw_RH, silent_RH = 20 * draw(20, 64), torch.zeros(20, 64)
    first, second = (_added(silent_RH, raw_RH, codec) for _ in range(2))
    assert first.judged_RH.all()
    assert first.added_RH.any()
    assert not used_twice([first, second])
    assert not shared([first], [second])


def test_what_a_codec_makes_of_the_value_itself_is_not_taken_for_noise() -> None:
    """A row with one huge value: int8 rounds all others away, alike wherever this row is sent."""
    draw = _draw(0)
    first_1H = torch.cat([torch.tensor([[5000.0]]), draw(1, 63)], dim=1)
    releases = [_added(draw(20, 64), torch.cat([first_1H, draw(19, 64)]), "int8") for _ in range(6)]
    assert not releases[0].judged_RH[0].any()
    assert can_be_compared(releases)
    assert not used_twice(releases)
    assert uneven(releases, STD) == []
    assert not can_be_compared([_added(draw(1, 64), first_1H, "int8")])


def test_an_update_is_taken_in_rows_and_a_small_one_leaves_nothing_in_doubt() -> None:
    draw = _draw(0)
    values_N1, noise_N1 = draw(1000, 1), draw(1000, 1)
    assert uneven([_added(noise_N1, values_N1)], STD) == []
    noise_N1[128:256] = 0.0
    assert uneven([_added(noise_N1, values_N1)], STD) == [0.0, 0.0]
    assert can_be_compared([_added(noise_N1[:9], values_N1[:9])])
