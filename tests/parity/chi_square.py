"""Pearson's test of counts against probabilities."""

from __future__ import annotations

import torch


def unlikely(counts, probabilities, at):
    """Whether counts as far off as these have a probability below `at`; rare outcomes are taken together."""
    total = sum(counts.values())
    if any(outcome not in probabilities for outcome in counts):
        return True
    cells, rest_count, rest_expected = [], 0, 0.0
    for outcome, probability in probabilities.items():
        if probability * total < 5:
            rest_count += counts.get(outcome, 0)
            rest_expected += probability * total
        else:
            cells.append((counts.get(outcome, 0), probability * total))
    if rest_expected > 0:
        cells.append((rest_count, rest_expected))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])) < at
