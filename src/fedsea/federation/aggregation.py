"""Averaging of trained parameters over clients.

Every method works name by name over those who hold the parameter, so that clients with different partitions
aggregate what they share. Each LoRA factor is averaged by itself: mean(B) · mean(A) is not mean(B · A). The
exact alternative is `aggregation.sync = "step"`, which sums gradients in every step (`sum_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedsea.plan import AggregationSection
from fedsea.plan.robust import LEAST, num_trimmed

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one participant brings to a round.

    Attributes:
        tensors: Its trained parameters by name.
        weight: Target tokens that it trained on.
    """

    tensors: Tensors
    weight: float


class Aggregator(Protocol):
    """One parameter of several participants becomes one."""

    def __call__(self, values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Combine `values`, all of one shape, in the given order."""
        ...


def mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean, summed in float64 in the given order (McMahan et al., arXiv 1602.05629).

    Example:
        >>> mean([torch.tensor([1.0]), torch.tensor([4.0])], [2, 1]).tolist()
        [2.0]
    """
    total = float(sum(weights))
    if total <= 0:
        weights, total = [1.0] * len(values), float(len(values))
    result = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        result += value.double() * (weight / total)
    return result.to(values[0].dtype)


def median(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:  # noqa: ARG001
    """Coordinate-wise median; the weights are not used (Yin et al., arXiv 1803.01498).

    With an even number of participants it is the mean of the two middle values.

    Example:
        >>> median([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([90.0])], [1, 1, 1]).tolist()
        [2.0]
    """
    ordered = torch.stack(list(values)).sort(dim=0).values
    count = len(values)
    middle = ordered[(count - 1) // 2].double() + ordered[count // 2].double()  # in float32 the sum may overflow
    return (middle / 2).to(values[0].dtype)


def trimmed_mean(trim_fraction: float) -> Aggregator:
    """Coordinate-wise mean without the `trim_fraction` smallest and largest values (Yin et al., arXiv 1803.01498).

    Of three or more values, at least one is cut off at each end. The weights are not used.

    Example:
        >>> values = [torch.tensor([float(v)]) for v in (0, 4, 6, 1000)]
        >>> trimmed_mean(0.25)(values, [1] * 4).tolist()
        [5.0]
    """

    def combine(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:  # noqa: ARG001
        cut = max(num_trimmed(trim_fraction, len(values)), int(len(values) >= LEAST))
        ordered = torch.stack(list(values)).sort(dim=0).values
        return ordered[cut : len(values) - cut].double().mean(dim=0).to(values[0].dtype)

    return combine


def _make(settings: AggregationSection) -> Aggregator:
    methods: dict[str, Callable[[], Aggregator]] = {
        "mean": lambda: mean,
        "median": lambda: median,
        "trimmed_mean": lambda: trimmed_mean(settings.trim_fraction),
    }
    return methods[settings.method]()


def aggregate(contributions: Sequence[Contribution], settings: AggregationSection) -> dict[str, torch.Tensor]:
    """Combine a round's contributions, name by name, in their order.

    Args:
        contributions: In the plan's order of clients, so that float sums come out the same in every run.
        settings: The plan's method.

    Returns:
        One tensor for every name that anybody holds.
    """
    combine = _make(settings)
    names = sorted({name for contribution in contributions for name in contribution.tensors})
    result = {}
    for name in names:
        holders = [contribution for contribution in contributions if name in contribution.tensors]
        result[name] = combine([c.tensors[name] for c in holders], [c.weight for c in holders])
    return result


def sum_gradients(contributions: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Sum gradients of summed losses, name by name, in their order; equals the gradient of the union's loss."""
    result: dict[str, torch.Tensor] = {}
    for tensors in contributions:
        for name, tensor in tensors.items():
            result[name] = result[name] + tensor if name in result else tensor.clone()
    return dict(sorted(result.items()))
