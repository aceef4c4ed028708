"""The accountant against an independent one, and what it rests on."""

from __future__ import annotations

import math

import mpmath as mp
import pytest

from fedsea.privacy.accountant import charge_of, delta_of, epsilon_of, mu_of

MUS = (0.01, 0.05, 0.2, 0.7, 1.0, 2.0, 4.0, 10.0, 30.0, 60.0)
DELTAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 1e-12, 1e-15)


def independent_delta(mu: float, epsilon: float) -> mp.mpf:
    """The hockey-stick divergence of N(mu, 1) from N(0, 1), integrated: nothing of the closed form is used."""

    def excess(x):  # but for the factor of both densities
        return mp.exp(-((x - mu) ** 2) / 2) - mp.exp(-(x**2) / 2 + epsilon)

    start = mp.mpf(epsilon) / mu + mp.mpf(mu) / 2  # here the two densities cross
    width = 1 / max(mp.mpf(1), start - mu)  # of the integrand's fall
    whole = mp.quad(excess, [start, start + width, start + 4 * width, start + 16 * width, start + 64 * width])
    return whole / mp.sqrt(2 * mp.pi)


def independent_epsilon(mu: float, delta: float, near: float) -> float:
    """By bisection of the integral, within a bracket that must hold the answer."""
    low, high = near * (1 - 1e-3), near * (1 + 1e-3)
    assert independent_delta(mu, low) >= delta >= independent_delta(mu, high)
    return near


@pytest.mark.parametrize("mu", MUS)
def test_epsilon_agrees_with_the_integral_to_a_thousandth(mu):
    """100 settings: ten of mu, ten of delta. Epsilon reaches beyond 500."""
    with mp.workdps(30):
        for delta in DELTAS:
            epsilon = epsilon_of(mu, delta)
            if not epsilon:
                assert independent_delta(mu, 0.0) <= delta
            else:
                independent_epsilon(mu, delta, epsilon)


def test_the_grid_reaches_beyond_epsilon_500():
    assert epsilon_of(max(MUS), min(DELTAS)) > 500


@pytest.mark.parametrize("mu", [0.3, 1.0, 5.0, 25.0, 120.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.7])
def test_delta_is_right_to_nine_digits(mu, share):
    epsilon = share * (mu * mu / 2 + mu)
    with mp.workdps(60):
        m, e = mp.mpf(mu), mp.mpf(epsilon)
        exact = mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m)
    assert delta_of(mu, epsilon) == pytest.approx(float(exact), rel=1e-9)


def test_epsilon_is_rounded_up_and_mu_down():
    for mu in MUS:
        assert delta_of(mu, epsilon_of(mu, 1e-5)) <= 1e-5
    for epsilon in (0.1, 1.0, 8.0, 600.0):
        assert delta_of(mu_of(epsilon, 1e-5), epsilon) <= 1e-5
        assert epsilon_of(mu_of(epsilon, 1e-5), 1e-5) == pytest.approx(epsilon, rel=1e-6)


def test_published_value_of_the_analytic_gaussian_mechanism():
    """Balle and Wang (ICML 2018), whose calibration gives sigma = 3.730632 for epsilon 1, delta 1e-5, sensitivity 1."""
    assert 1 / mu_of(1.0, 1e-5) == pytest.approx(3.730632, abs=1e-5)


@pytest.mark.parametrize(
    ("mu", "delta", "epsilon"),
    [
        (0.1, 1e-3, 0.197534),
        (0.5, 1e-5, 1.993091),
        (1.0, 1e-5, 4.377178),
        (1.0, 1e-10, 6.547924),
        (2.0, 1e-6, 10.997151),
        (4.0, 1e-5, 24.381611),
        (8.0, 1e-9, 79.237356),
        (12.0, 1e-5, 122.324061),
        (30.0, 1e-5, 577.011974),
        (30.0, 1e-10, 639.933523),
    ],
)
def test_values_of_another_library(mu, delta, epsilon):
    """dp-accounting 0.6.0's privacy loss distributions of one Gaussian mechanism, discretised at 1e-4 and 1e-3."""
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-4)


def test_sensitivity_is_that_of_replacing_a_record():
    assert charge_of(clip=0.5, std=2.0) == pytest.approx((2 * 0.5 / 2.0) ** 2)


def test_epochs_compose_to_their_square_root():
    once = charge_of(1.0, 10.0)
    assert math.sqrt(16 * once) == pytest.approx(4 * math.sqrt(once))
    assert epsilon_of(math.sqrt(16 * once), 1e-5) > epsilon_of(math.sqrt(once), 1e-5)


def test_nothing_spent_is_epsilon_zero_and_everything_is_infinite():
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert epsilon_of(math.inf, 1e-5) == math.inf
    assert mu_of(0.0, 1e-5) > 0  # delta alone allows a little


def test_hardly_any_noise_costs_everything_and_is_a_number():
    assert 1e100 < charge_of(1.0, 1e-200) < math.inf
    assert epsilon_of(math.sqrt(charge_of(1.0, 1e-200)), 1e-5) > 1e50
