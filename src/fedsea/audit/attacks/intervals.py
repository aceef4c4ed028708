"""Exact binomial intervals, and what a test's error rates say of a mechanism."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from fedsea.errors import ConfigError

_NORMAL = NormalDist()
_BISECTIONS = 60


class _AtMost:
    """P(X <= count) for a binomial X, with a relative error near rounding's, at any number of probabilities."""

    def __init__(self, count: int, trials: int) -> None:
        self._all = count >= trials
        self._i = torch.arange(count + 1, dtype=torch.float64)
        n = torch.tensor(float(trials), dtype=torch.float64)
        self._others = n - self._i
        self._log_ways = torch.lgamma(n + 1) - torch.lgamma(self._i + 1) - torch.lgamma(self._others + 1)

    def __call__(self, p: float) -> float:
        if self._all or p <= 0.0:
            return 1.0
        if p >= 1.0:
            return 0.0
        logs = self._log_ways + self._i * math.log(p) + self._others * math.log1p(-p)
        return float(torch.logsumexp(logs, 0).exp())


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
        at_most = _AtMost(successes, trials)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(middle) > tail else (low, middle)
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
