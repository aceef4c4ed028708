"""Memory in which several sequences' keys and values lie side by side.

N  key/value heads, T  new tokens, C  capacity in tokens, D  head size
"""

from __future__ import annotations

import math
import mmap
import sys

import torch

PAGE_TOKENS = 32
"""Tokens of a page."""


def pages_for(num_tokens: int) -> int:
    """Pages that are set aside for a sequence of so many tokens: a power of two, so that rooms can be used again.

    >>> pages_for(1), pages_for(32), pages_for(33), pages_for(300)
    (1, 1, 2, 16)
    """
    return 1 << (-(-num_tokens // PAGE_TOKENS) - 1).bit_length()


def capacity_for(num_tokens: int) -> int:
    """Tokens of those pages."""
    return pages_for(num_tokens) * PAGE_TOKENS


class Slab:
    """Memory for several sequences of one capacity, so that one attention call serves them all.

    A block's part is made when the first token reaches that block; on a CPU the system gives memory for it only as it
    is written.

    Args:
        num_blocks: Blocks of the segment.
        capacity: Most tokens of a sequence.
        num_slots: Most sequences.

    Attributes:
        free: Slots that no sequence has.
    """

    def __init__(self, num_blocks: int, capacity: int, num_slots: int) -> None:
        self.capacity = capacity
        self.num_slots = num_slots
        self.free = list(range(num_slots))[::-1]
        self._blocks: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_blocks

    @property
    def num_tokens(self) -> int:
        """Of all slots at full capacity."""
        return self.num_slots * self.capacity

    def of(self, block: int, keys_NTD: torch.Tensor, values_NTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [slots, N, C, D] of a block, made like these if there are none yet."""
        found = self._blocks[block]
        if found is None:
            found = self._blocks[block] = self._made_like(keys_NTD), self._made_like(values_NTD)
        return found

    def _made_like(self, part_NTD: torch.Tensor) -> torch.Tensor:
        heads, _, size = part_NTD.shape
        return _zeros((self.num_slots, heads, self.capacity, size), part_NTD.dtype, part_NTD.device)

    def take_over(self, slot: int, other: Slab, source: int, length: int) -> None:
        """Copy the first tokens of another slot, of this or of another slab of the segment, to a slot of this one."""
        for block, pair in enumerate(other._blocks):
            if pair is not None:
                for mine, theirs in zip(self.of(block, pair[0][0], pair[1][0]), pair, strict=True):
                    mine[slot, :, :length] = theirs[source, :, :length]

    def wipe(self, slot: int, start: int, stop: int) -> None:
        """Make some of a slot's tokens zero again."""
        for pair in self._blocks:
            for memory in pair or ():
                memory[slot, :, start:stop] = 0

    def drop(self) -> None:
        """Give the memory back, whoever still holds a closed sequence of it."""
        self._blocks = [None] * len(self._blocks)

    @property
    def num_bytes(self) -> int:
        """Memory that was made so far."""
        made = (memory for pair in self._blocks for memory in pair or ())
        return sum(memory.numel() * memory.element_size() for memory in made)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because masked values are still multiplied, and garbage may be NaN.

    On a CPU straight from the operating system, in pages that it hands out as they are written and has back at once
    when the tensor goes: torch's zeros are all written, and the C library keeps what is freed.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        memory = mmap.mmap(-1, num_bytes)
    else:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
