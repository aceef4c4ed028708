"""Noise: its distribution, its generator, and that no two draws are the same."""

from __future__ import annotations

import math
import os

import pytest
import torch

from fedsea.plan.sections import LARGEST, SMALLEST
from fedsea.privacy.noise import GaussianNoise

KEY = bytes(range(32))
MANY = 1 << 22


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return GaussianNoise(KEY).standard_normal(MANY)


def test_values_are_standard_normal_by_moments_and_quantiles(drawn):
    values = drawn.double()
    error = 1 / math.sqrt(MANY)
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((values**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96) * error
    ordered = values.sort().values
    exact = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(1, MANY + 1, dtype=torch.float64) / MANY
    assert (exact - steps).abs().max() < 2.0 * error  # Kolmogorov-Smirnov; passed by 99.9 % of right generators


@pytest.mark.parametrize("std", [SMALLEST, LARGEST])
def test_the_least_and_the_most_noise_of_a_plan_have_their_standard_deviation(std):
    noised = GaussianNoise(KEY).add(torch.zeros(1 << 16), std)
    assert float(noised.double().std()) == pytest.approx(std, rel=0.02)
    assert GaussianNoise(KEY).add(torch.tensor([-1e4, 1e4]), std).isfinite().all()


def test_neighbours_and_pairs_are_uncorrelated(drawn):
    values = drawn.double()
    limit = 5 / math.sqrt(MANY)
    half = 1 << 16  # the two values of a pair lie so far apart
    for lag in (1, 2, half, MANY // 2):
        assert abs((values[:-lag] * values[lag:]).mean()) < limit
    assert abs((values[:-half] ** 2 * values[half:] ** 2).mean() - 1) < 5 * 3 / math.sqrt(MANY)


def test_tails_have_their_share(drawn):
    for sigma in (3.0, 4.0, 4.5):
        expected = MANY * math.erfc(sigma / math.sqrt(2))
        found = int((drawn.abs() > sigma).sum())
        assert abs(found - expected) < 5 * math.sqrt(expected)


def test_tails_have_no_gaps_that_would_tell_a_wrong_guess_of_the_text(drawn):
    """Radii of 31 bits alone are those of k + 1/2, and 4 standard deviations out they lie far apart."""
    first, second = drawn.double().view(-1, 2, 1 << 16).unbind(1)  # pairs of a chunk: cosines, then sines
    squares = first.square() + second.square()
    numbers = torch.exp(-squares / 2) * 2.0**31
    numbers = numbers[numbers < 10_000]  # beyond, float32 cannot show the gaps
    assert len(numbers) > 3
    assert ((numbers % 1 - 0.5).abs() > 0.1).any()


def test_the_smallest_word_gives_the_largest_value_and_it_is_finite(monkeypatch):
    generator = GaussianNoise()
    monkeypatch.setattr(generator, "_words", lambda count: torch.zeros(count, dtype=torch.int32))
    values = generator.standard_normal(2)
    assert values.tolist() == pytest.approx([math.sqrt(-2 * math.log(2.0**-63)), 0.0])
    assert values[0] > 9.3
    monkeypatch.setattr(generator, "_words", lambda count: torch.full((count,), -1, dtype=torch.int32))
    assert torch.isfinite(generator.standard_normal(2)).all()


def test_the_standard_deviation_is_the_one_asked_for():
    values_TH = torch.randn(64, 128) * 3
    for std in (1e-3, 0.7, 12.0):
        added = GaussianNoise().add(values_TH.repeat(64, 1), std) - values_TH.repeat(64, 1)
        assert float(added.double().std()) == pytest.approx(std, rel=0.01)
        assert abs(float(added.double().mean())) < 5 * std / math.sqrt(added.numel())


def test_noised_values_lie_on_a_grid_whatever_they_were_added_to():
    values = torch.tensor([0.1, 1 / 3, math.pi, -2e-7]).repeat(1000)
    grain = 2.0 ** (math.floor(math.log2(0.7)) - 12)
    noised = GaussianNoise().add(values, 0.7)
    assert torch.equal(noised, (noised / grain).round() * grain)


def test_input_is_left_alone_and_output_is_float32():
    values = torch.ones(3, 5, dtype=torch.bfloat16, requires_grad=True)
    noised = GaussianNoise().add(values, 1.0)
    assert noised.dtype is torch.float32
    assert noised.shape == (3, 5)
    assert not noised.requires_grad
    assert torch.equal(values, torch.ones(3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("count", [1, 2, 3, (1 << 17) + 1])
def test_any_number_of_values_can_be_drawn(count):
    values = GaussianNoise().standard_normal(count)
    assert values.shape == (count,)
    assert int((values == 0).sum()) <= 1


def test_a_key_repeats_its_noise_and_no_other_does():
    assert torch.equal(GaussianNoise(KEY).standard_normal(100), GaussianNoise(KEY).standard_normal(100))
    assert not torch.equal(GaussianNoise().standard_normal(100), GaussianNoise().standard_normal(100))


def test_a_generator_never_repeats_itself():
    generator = GaussianNoise(KEY)
    first, second = generator.standard_normal(1000), generator.standard_normal(1000)
    assert not set(first.tolist()) & set(second.tolist())


def test_a_forked_process_has_noise_of_its_own():
    generator = GaussianNoise()
    generator.standard_normal(4)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, generator.standard_normal(4).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 64)
    os.close(reader), os.close(writer)
    assert len(theirs) == 16
    assert theirs != generator.standard_normal(4).numpy().tobytes()
