"""Telling what a model was trained on from what it was not: the mathematics of attack A8, on plain scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsea.audit.attacks.intervals import clopper_pearson
from fedsea.errors import ConfigError

_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Membership:
    """How well scores tell members from others.

    Attributes:
        auc: Chance that a member scores above another text; 0.5 is guessing.
        auc_interval: 95 %, bootstrapped over both sides.
        tpr: Share of the members above the threshold that so few others pass.
        tpr_interval: 95 %, exact, of that share at that threshold.
        fpr: Share of the others that pass: at most one in a hundred, so none where there are fewer.
        exposure: Mean over members of log2(others + 1) - log2(rank among the others), in bits (Carlini et al. 2019).
        most_exposure: What the best rank gives.
        num_members: Texts that were trained on.
        num_others: Texts of the same kind that were not.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    fpr: float
    exposure: float
    most_exposure: float
    num_members: int
    num_others: int


def membership(members: Sequence[float], others: Sequence[float], seed: int = 0, resolution: float = 0.0) -> Membership:
    """Compare the scores of trained texts with those of never-seen ones; higher means "trained on".

    Args:
        members: One score for each trained text.
        others: One for each text of the same kind that was not.
        seed: Of the bootstrap.
        resolution: Scores that lie no further apart are equal, for all that is known of them.

    Raises:
        ConfigError: A side is empty, or a score is not finite.

    >>> found = membership([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    >>> found.auc, found.tpr, found.exposure
    (1.0, 1.0, 2.0)
    """
    if not members or not others:
        raise ConfigError("Membership needs texts that were trained on and texts that were not.")
    if not all(map(math.isfinite, (*members, *others))):
        raise ConfigError("Membership needs scores that are finite: what is NaN is neither above nor below another.")
    inside_M = torch.tensor(members, dtype=torch.float64)
    outside_N = torch.tensor(others, dtype=torch.float64)
    above_MN = inside_M[:, None] - outside_N
    wins_MN = (above_MN > resolution).double() + 0.5 * (above_MN.abs() <= resolution).double()
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(_DRAWS):
        rows = torch.randint(len(members), (len(members),), generator=generator)
        columns = torch.randint(len(others), (len(others),), generator=generator)
        draws.append(wins_MN[rows][:, columns].mean())
    low, high = torch.stack(draws).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    allowed = math.floor(0.01 * len(others))
    threshold = float(outside_N.sort(descending=True).values[allowed])
    hits = int((inside_M > threshold + resolution).sum())
    ranks_M = len(others) + 1 - wins_MN.sum(1)  # among equals, the middle one
    exposure = float((math.log2(len(others) + 1) - ranks_M.log2()).mean())
    return Membership(
        auc=float(wins_MN.mean()),
        auc_interval=(low, high),
        tpr=hits / len(members),
        tpr_interval=clopper_pearson(hits, len(members)),
        fpr=float((outside_N > threshold).double().mean()),
        exposure=exposure,
        most_exposure=math.log2(len(others) + 1),
        num_members=len(members),
        num_others=len(others),
    )
