"""Exact accounting of Gaussian mechanisms (Dong, Roth, Su, JRSS B 2022; Balle, Wang, ICML 2018).

A release with sensitivity S and noise of standard deviation sigma is mu-GDP with mu = S / sigma. Releases compose to
sqrt(sum of mu^2), also if each is chosen after the answers to the ones before. Replacing a record that is clipped to C
changes a release by at most S = 2 C. There is no amplification by sampling: the server sees who sends, and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_MOST = 1e150
"""A charge that is no protection whatever; sums of it stay finite."""


def charge_of(clip: float, std: float) -> float:
    """mu^2 of one release: (2 C / sigma)^2.

    >>> charge_of(1.0, 4.0)
    0.25
    """
    ratio = 2.0 * clip / std
    return min(ratio * ratio, _MOST)


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta with which mu-GDP gives (epsilon, delta)-DP.

    >>> round(delta_of(1.0, 1.0), 6)
    0.126937
    """
    if mu <= 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    # Phi(b) - e^epsilon Phi(-a), and e^epsilon exp(-a^2 / 2) = exp(-b^2 / 2): nothing overflows.
    a, b = (epsilon / mu + mu / 2) / math.sqrt(2), (mu / 2 - epsilon / mu) / math.sqrt(2)
    if b >= 0:
        return 0.5 * (math.erfc(-b) - math.exp(-b * b) * _erfcx(a))
    return 0.5 * math.exp(-b * b) * (_erfcx(-b) - _erfcx(a))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon with which mu-GDP gives (epsilon, delta)-DP, rounded up.

    >>> round(epsilon_of(1.0, 1e-5), 4)
    4.3772
    """
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2.0 * math.log(delta))
    return _narrowed(low, high, lambda epsilon: delta_of(mu, epsilon) > delta)[1]


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu that stays within (epsilon, delta), rounded down.

    >>> round(mu_of(4.3772, 1e-5), 4)
    1.0
    """
    low, high = 0.0, 1.0
    while delta_of(high, epsilon) <= delta:
        low, high = high, 2 * high
    return _narrowed(low, high, lambda mu: delta_of(mu, epsilon) <= delta)[0]


def _narrowed(low: float, high: float, is_low: Callable[[float], bool]) -> tuple[float, float]:
    """Two numbers as near to one another as makes a difference, the first of which `is_low`, and the second is not."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def _erfcx(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0, to about 1e-13."""
    if x < 20.0:
        return math.exp(x * x) * math.erfc(x)
    square, term, total = 2.0 * x * x, 1.0, 1.0
    for k in range(1, 12):  # the asymptotic series, whose terms are below 1e-16 by then
        term *= -(2 * k - 1) / square
        total += term
    return total / (x * math.sqrt(math.pi))
