"""Whether words look drawn at random from all 64 bits, by tests whose false alarms are bounded without approximation.

N  words
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_BITS, _BYTES, _VALUES = 64, 8, 256
_COUNTS = 2 * _BITS + _BYTES * _VALUES
"""Counts that are held against their bound: of every bit's zeros and ones, and of every byte's values."""
_MOST_REPEATS = 2
"""Uniform words repeat more often with a probability under (N² / 2^65)³ only."""


def looks_uniform(words_N: npt.NDArray[np.uint64], false_alarm: float) -> bool:
    """Whether no bit and no byte of the words has a value far more often than a uniform draw gives it.

    Args:
        words_N: Any number; the fewer, the less is seen.
        false_alarm: Bound of the probability that uniform words fail.
    """
    if not len(words_N):
        return True
    if len(words_N) - len(np.unique(words_N)) > _MOST_REPEATS:
        return False
    bytes_NB = np.ascontiguousarray(words_N).astype("<u8").view(np.uint8).reshape(-1, _BYTES)
    ones_K = np.unpackbits(bytes_NB, axis=1).sum(axis=0, dtype=np.int64)
    most_bits = int(max(ones_K.max(), len(words_N) - ones_K.min()))
    most_bytes = max(int(np.bincount(column_N, minlength=_VALUES).max()) for column_N in bytes_NB.T)
    limit = math.log(_COUNTS / false_alarm)
    return (
        _surprise(most_bits, len(words_N), 1 / 2) < limit and _surprise(most_bytes, len(words_N), 1 / _VALUES) < limit
    )


def _surprise(count: int, total: int, share: float) -> float:
    """Chernoff's bound of the chance that `total` draws hit a value of this share `count` times or more, as -log."""
    found = count / total
    if found <= share:
        return 0.0
    missed = (1 - found) * math.log((1 - found) / (1 - share)) if found < 1 else 0.0
    return total * (found * math.log(found / share) + missed)
