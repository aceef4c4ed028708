"""A test of a noise mechanism from outside: the mathematics of attack A9.

Two neighbouring inputs go through the mechanism many times. A threshold on the releases' projection is chosen on one
half of them; how often it tells the inputs apart on the other half, with exact intervals, bounds epsilon from below.

    N  trials, L  rows of a trial's sequence, H  hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fedsea.audit.attacks.intervals import clopper_pearson, epsilon_bound, mu_bound

Mechanism: TypeAlias = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
"""Rows of all sequences and their lengths to what is released of them; each sequence is an input of its own."""

_BEYOND_CLIP = 4.0
"""Norm of the inputs over the clip bound: as a client's own rows might be, so that a clip left out shows."""

_THRESHOLDS = 200


@dataclass(frozen=True, slots=True)
class MechanismBound:
    """What a test found.

    Attributes:
        epsilon: Lower bound on epsilon at `delta`, whatever the mechanism is.
        mu: Lower bound on the Gaussian mu; the claim is one of mu, so this is the sharper test.
        delta: As claimed.
        num_trials: Releases of each input in the half that counts.
        confidence: With which both bounds hold.
    """

    epsilon: float
    mu: float
    delta: float
    num_trials: int
    confidence: float


def bound_mechanism(
    mechanism: Mechanism,
    *,
    clip: float,
    width: int,
    delta: float,
    rows: int = 4,
    num_trials: int = 50_000,
    confidence: float = 0.99,
    seed: int = 0,
) -> MechanismBound:
    """Lower bounds from a mechanism's releases of two inputs that lie as far apart as neighbours can.

    Args:
        mechanism: What is tested; it draws its own noise.
        clip: Bound that it is said to keep.
        width: H.
        delta: Of the claim.
        rows: L; 1 for a mechanism whose unit is a token.
        num_trials: Releases of each input, in each half.
        confidence: Of the bounds.
        seed: Of the direction in which the inputs differ.
    """
    generator = torch.Generator().manual_seed(seed)
    direction_LH = torch.randn(rows, width, generator=generator)
    direction_LH /= direction_LH.norm()
    halves = []
    for sign in (1.0, -1.0):
        input_LH = sign * _BEYOND_CLIP * clip * direction_LH
        released_TH = mechanism(input_LH.repeat(2 * num_trials, 1), (rows,) * (2 * num_trials))
        score_N = (released_TH.float().view(2 * num_trials, rows, width) * direction_LH).sum((1, 2)).double()
        halves.append((score_N[:num_trials], score_N[num_trials:]))
    (chosen_plus, plus_N), (chosen_minus, minus_N) = halves
    best_epsilon = best_mu = 0.0
    for flip in (1.0, -1.0):  # the test may decide for either input
        positive, negative = (chosen_plus, chosen_minus) if flip > 0 else (chosen_minus, chosen_plus)
        of_epsilon, of_mu = _thresholds(flip * positive, flip * negative, delta)
        positive, negative = (plus_N, minus_N) if flip > 0 else (minus_N, plus_N)
        for threshold, which in ((of_epsilon, "epsilon"), (of_mu, "mu")):
            # Two intervals in each of two directions: each end has its share of what the confidence leaves.
            level = 1 - (1 - confidence) / 2
            hits = int((flip * positive > threshold).sum())
            alarms = int((flip * negative > threshold).sum())
            low = clopper_pearson(hits, num_trials, level)[0]
            high = clopper_pearson(alarms, num_trials, level)[1]
            if which == "epsilon":
                best_epsilon = max(best_epsilon, epsilon_bound(low, high, delta))
            else:
                best_mu = max(best_mu, mu_bound(low, high))
    return MechanismBound(best_epsilon, best_mu, delta, num_trials, confidence)


def _thresholds(positive_N: torch.Tensor, negative_N: torch.Tensor, delta: float) -> tuple[float, float]:
    """Thresholds on the first half that promise the largest bound on epsilon, and on mu."""
    num_trials = len(positive_N)
    ranks = torch.logspace(0.5, torch.log10(torch.tensor(num_trials - 1.0)).item(), _THRESHOLDS).long()
    sorted_N = negative_N.sort(descending=True).values
    best = [(-1.0, 0.0), (-1.0, 0.0)]
    for rank in sorted(set(ranks.clamp_max(num_trials - 1).tolist())):
        threshold = float(sorted_N[rank])
        # Wald's ends are near enough to choose by; what counts is exact and on the other half.
        true, false = float((positive_N > threshold).double().mean()), rank / num_trials
        low = true - 3 * (true * (1 - true) / num_trials) ** 0.5
        high = false + 3 * (max(false, 1 / num_trials) / num_trials) ** 0.5
        for place, value in enumerate((epsilon_bound(low, high, delta), mu_bound(low, high))):
            if value > best[place][0]:
                best[place] = (value, threshold)
    return best[0][1], best[1][1]
