"""Exact binomial intervals, and what a test's error rates say of a mechanism."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from fedsea.errors import ConfigError

_NORMAL = NormalDist()
_BISECTIONS = 60


def _at_most(count: int, trials: int, p: float) -> float:
    """P(X <= count) for a binomial X, with a relative error near rounding's."""
    if count >= trials or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    i = torch.arange(count + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log_ways = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return float(torch.logsumexp(log_ways + i * math.log(p) + (n - i) * math.log1p(-p), 0).exp())


def clopper_pearson(count: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a probability.

    Args:
        count: Successes.
        trials: Of so many independent trials.
        confidence: Of the whole interval; each end has half of what is missing.

    Raises:
        ConfigError: Fewer than no successes, or more than trials.

    >>> [round(end, 4) for end in clopper_pearson(5, 10)]
    [0.1871, 0.8129]
    """
    if not 0 <= count <= trials or trials < 1:
        raise ConfigError(f"{count} successes of {trials} trials is no outcome.")
    tail = (1.0 - confidence) / 2

    def upper(successes: int) -> float:
        """Largest p under which so few successes are not rarer than the tail."""
        if successes == trials:
            return 1.0
        low, high = successes / trials, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if _at_most(successes, trials, middle) > tail else (low, middle)
        return high

    return 1.0 - upper(trials - count), upper(count)


def epsilon_bound(true_positive: float, false_positive: float, delta: float) -> float:
    """Epsilon that any (epsilon, delta) mechanism must have to let a test reach these rates (0 if they show none)."""
    if true_positive <= delta:
        return 0.0
    return max(0.0, math.log((true_positive - delta) / max(false_positive, 1e-300)))


def mu_bound(true_positive: float, false_positive: float) -> float:
    """Gaussian mu that a mechanism must have to let a test reach these rates (0 if they show none).

    >>> round(mu_bound(NormalDist().cdf(0.5), NormalDist().cdf(-1.5)), 6)
    2.0
    """
    inside = (min(max(rate, 1e-300), 1 - 1e-16) for rate in (true_positive, false_positive))
    high, low = (_NORMAL.inv_cdf(rate) for rate in inside)
    return max(0.0, high - low)
