"""Noise and clipping on a CUDA device: the same random bits, and the same distribution."""

from __future__ import annotations

import pytest
import torch

from fedsea.plan import parse_plan
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.clip import clip_sequences
from fedsea.privacy.noise import GaussianNoise
from fedsea.types import Origin, Purpose

KEY = bytes(range(32))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


def test_noise_has_its_standard_deviation_on_the_device():
    values = torch.randn(512, 1024, device="cuda") * 3
    noised = GaussianNoise().add(values, 0.7)
    assert noised.is_cuda
    difference = (noised - values).double()
    assert float(difference.std()) == pytest.approx(0.7, rel=0.01)
    assert abs(float(difference.mean())) < 0.01
    assert float((difference**4).mean() / 0.7**4) == pytest.approx(3.0, rel=0.03)


def test_the_same_key_gives_the_same_noise_as_on_the_cpu():
    """To the rounding of each device's logarithms."""
    there = GaussianNoise(KEY).standard_normal(1 << 12, "cuda").cpu()
    here = GaussianNoise(KEY).standard_normal(1 << 12)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def test_clipping_agrees_with_the_cpus():
    values = torch.randn(12, 64) * 10
    there = clip_sequences(values.cuda(), (5, 7), 1.0).cpu()
    torch.testing.assert_close(there, clip_sequences(values, (5, 7), 1.0), rtol=1e-5, atol=1e-6)


def test_a_release_of_the_device_stays_there_until_it_is_encoded():
    plan = parse_plan(
        {
            "model": {"path": "x"},
            "clients": [{"name": "a"}],
            "trust": {"mode": "noised"},
            "noise": {"hidden_std": 1.0, "hidden_clip": 1.0},
        }
    )
    release = Boundary.of(plan).hidden(torch.randn(8, 64, device="cuda"), Origin(Purpose.TRAINING, (5, 3)))
    assert release.take()[""].is_cuda
