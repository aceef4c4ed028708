"""Order and held-out split as pure functions of seed and row, the same on every machine and library version."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsea.data.rows import Int64s

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def hash64(values: Int64s, *keys: int) -> npt.NDArray[np.uint64]:
    """Hash of each value under integer keys: SplitMix64 (Steele, Lea and Flood, 2014), its stream chosen by the keys.

    numpy's and torch's own generators may change their streams between versions; a resumed run may not.
    """
    stream = 0
    for key in keys:
        stream = (stream ^ (key & _MASK)) + _GOLDEN & _MASK
        for shift, factor in _MIX:
            stream = (stream ^ stream >> shift) * factor & _MASK
        stream ^= stream >> 31
    mixed = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(stream)
    for shift, factor in _MIX:
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return mixed ^ mixed >> np.uint64(31)


def shuffled(values: Int64s, *keys: int, blocks: Int64s | None = None) -> Int64s:
    """The values in an order that the keys decide.

    Args:
        values: Distinct values.
        keys: Seed, epoch, …
        blocks: Block of each value: blocks come one after the other, in shuffled order, each shuffled in itself.
    """
    within = hash64(values, *keys)
    if blocks is None:
        return values[np.argsort(within, kind="stable")]
    return values[np.lexsort((within, blocks, hash64(blocks, *keys, 1)))]


def heldout_mask(num_rows: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: about `share` of them; with two rows or more, at least one is and one is not."""
    if share <= 0 or num_rows < 2:
        return np.zeros(num_rows, np.bool_)
    hashes = hash64(np.arange(num_rows, dtype=np.int64), seed)
    mask = hashes < np.uint64(min(int(share * 2**64), _MASK))
    if not mask.any():
        mask[hashes.argmin()] = True
    elif mask.all():
        mask[hashes.argmax()] = False
    return mask
