"""Weighted values as integers mod 2^64, so that masks cancel exactly and the sum's error is known beforehand.

A client with weight w (its target tokens) turns each value v into w · round(v · 2^f). Integers add exactly, so the only
error of the mean is each client's rounding, at most 2^-(f+1), weighted like the values themselves: |error| <= 2^-(f+1)
before the mean is rounded to float32. Why 2^64: a weighted sum over many clients fits beside a fraction as fine as
float32's at the size of trained parameters, and 64-bit integers wrap around by themselves, in numpy and torch alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from fedsea.errors import AggregationError, ConfigError

_RANGE_BITS = 10
_SIGNED_BITS = 62
"""Of a sum's magnitude: below half of 2^64, with a factor of two to spare for rounding."""
_FINEST_BITS, _COARSEST_BITS = 32, 16

LARGEST = 2.0**_RANGE_BITS
"""Values beyond are refused."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The form of a round's numbers.

    Attributes:
        fraction_bits: f.
        most_weight: Largest weight of one client.
    """

    fraction_bits: int
    most_weight: int

    @classmethod
    def of(cls, num_clients: int, most_weight: int) -> Self:
        """The finest fraction with which no sum can overflow.

        Example:
            >>> FixedPoint.of(10, 2**20).fraction_bits
            28

        Raises:
            ConfigError: It would be too coarse to be of use.
        """
        bits = _SIGNED_BITS - _RANGE_BITS - (num_clients * most_weight - 1).bit_length()
        if bits < _COARSEST_BITS:
            raise ConfigError(
                f"Secure aggregation cannot sum {num_clients} clients of up to {most_weight} target tokens a round "
                "with enough precision: make rounds shorter (training.steps_per_round)."
            )
        return cls(min(bits, _FINEST_BITS), most_weight)

    @property
    def error(self) -> float:
        """Largest error of a mean, before it is rounded to float32."""
        return 2.0 ** -(self.fraction_bits + 1)

    def encode(self, values: torch.Tensor, weight: int, what: str) -> np.ndarray:
        """Words of `values` times `weight`, flattened.

        Args:
            values: Of any shape.
            weight: Of the client.
            what: Name of the parameter, for the message.

        Raises:
            AggregationError: A value or the weight is out of range.
        """
        if not 0 < weight <= self.most_weight:
            raise AggregationError(
                f"A weight of {weight} target tokens is outside 1 to {self.most_weight}, the most that the plan allows "
                "in a round: nothing was sent. Restore the newest run folder at this client."
            )
        flat = values.detach().reshape(-1).to("cpu", torch.float64).numpy()
        if flat.size and not float(np.abs(flat).max()) <= LARGEST:
            raise AggregationError(
                f"A value of {what} is beyond {LARGEST:g}, the range of secure aggregation (or not a number): nothing "
                "was sent. Lower the learning rate, or set aggregation.secure = false."
            )
        words = np.rint(flat * 2.0**self.fraction_bits).astype(np.int64)
        words *= weight
        return words.view(np.uint64)

    def decode(self, words: np.ndarray, weight: int) -> torch.Tensor:
        """The mean of summed words, float32, flat.

        Args:
            words: Their sum mod 2^64.
            weight: Sum of the weights; above 0.
        """
        mean = words.view(np.int64).astype(np.float64) / (float(weight) * 2.0**self.fraction_bits)
        return torch.from_numpy(mean).to(torch.float32)
