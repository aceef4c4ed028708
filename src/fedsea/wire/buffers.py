"""Memory for received tensors, used again once nobody holds the tensor any more.

A fresh buffer of many megabytes costs far more in page faults than the copy into it, so large ones are lent out over
and over. A buffer counts as returned when the array that was lent has died, which is after the last tensor, view or
autograd graph that shares its storage; so a tensor that someone still holds is never written to.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch

_ALIGNMENT = 64
"""Bytes; matrix products take other paths (and round otherwise) on memory that is aligned otherwise."""

_SMALLEST_LENT = 64 << 10
"""Smaller tensors come from torch's own allocator, which reuses them well."""

_KEPT_OVER_LARGEST = 4
"""Unused buffers are kept up to this many times the largest request."""


class BufferPool:
    """Float32 tensors with 64-byte alignment, out of reused memory. Not thread-safe: it lives in the event loop."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lent: list[tuple[weakref.ref[np.ndarray], np.ndarray]] = []
        self._largest = 0

    @property
    def num_bytes(self) -> int:
        """All memory that the pool holds, lent or not."""
        return sum(base.nbytes for base in self._free) + sum(base.nbytes for _, base in self._lent)

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor that nobody else holds."""
        num_bytes = 4 * math.prod(shape)
        if num_bytes < _SMALLEST_LENT:
            return torch.empty(shape, dtype=torch.float32)
        self._largest = max(self._largest, num_bytes)
        self._reclaim()
        base = self._find(num_bytes)
        start = -base.ctypes.data % _ALIGNMENT
        view = base[start : start + num_bytes].view(np.float32)
        self._lent.append((weakref.ref(view), base))
        return torch.from_numpy(view).view(shape)

    def _find(self, num_bytes: int) -> np.ndarray:
        fitting = [
            (base.nbytes, index)
            for index, base in enumerate(self._free)
            if num_bytes + _ALIGNMENT <= base.nbytes <= 2 * num_bytes + _ALIGNMENT
        ]
        if fitting:
            return self._free.pop(min(fitting)[1])
        # In steps of an eighth, so that micro-batches of slightly different sizes share buffers.
        step = max(_SMALLEST_LENT, 1 << (num_bytes.bit_length() - 4))
        return np.empty(-(-num_bytes // step) * step + _ALIGNMENT, dtype=np.uint8)

    def _reclaim(self) -> None:
        still_lent = []
        for array, base in self._lent:
            if array() is None:
                self._free.append(base)
            else:
                still_lent.append((array, base))
        self._lent = still_lent
        spare = sum(base.nbytes for base in self._free)
        while spare > _KEPT_OVER_LARGEST * self._largest:
            spare -= self._free.pop(0).nbytes
