"""Which sequences of a batch are attended to in one call: those of one slab that bring equally many new tokens.

S  sequences of a group, M  new tokens of each, T = S M  rows, N  key/value heads, C  longest so far, D  head size
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from fedsea.model.cache import Extension, SequenceCache, Slab


class Group:
    """Sequences of one slab with equally many new tokens, in the order of their slots.

    Attributes:
        rows: Rows of the batch that are theirs, or None for all of them in order.
        new: M.
    """

    def __init__(
        self, caches: Sequence[SequenceCache], new: int, rows: torch.Tensor | None, device: torch.device
    ) -> None:
        self.rows = rows
        self.new = new
        self.num_sequences = len(caches)
        self._slab: Slab = caches[0].slab
        self._pasts = [cache.length for cache in caches]
        self._slots = [cache.slot for cache in caches]
        self._device = device
        self._masks: dict[int | None, tuple[torch.Tensor | None, bool]] = {}
        self._longest = max(self._pasts) + new
        first, last = self._slots[0], self._slots[-1]
        self._span = slice(first, last + 1)
        self._dense = last + 1 - first == len(caches)
        if len(caches) > 1:
            self._slots_S1 = torch.tensor(self._slots, device=device)[:, None]
            self._at_SM = torch.tensor(self._pasts, device=device)[:, None] + torch.arange(new, device=device)

    def write(self, block: int, keys_TND: torch.Tensor, values_TND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values into their slots.

        Returns:
            All keys and values so far, [S, N, C, D] each; views unless other sequences' slots lie between.
        """
        memories = self._slab.of(block, keys_TND.transpose(0, 1), values_TND.transpose(0, 1))
        keys, values = (
            self._written(memory, new) for memory, new in zip(memories, (keys_TND, values_TND), strict=True)
        )
        return keys, values

    def _written(self, memory: torch.Tensor, new_TND: torch.Tensor) -> torch.Tensor:
        if self.num_sequences == 1:
            slot, past = self._slots[0], self._pasts[0]
            memory[slot, :, past : past + self.new] = new_TND.transpose(0, 1)
            return memory[self._span, :, : self._longest]
        # Indices on both sides of a slice: their axes come first, so the values are [S, M, N, D].
        memory[self._slots_S1, :, self._at_SM] = new_TND.reshape(self.num_sequences, self.new, *new_TND.shape[1:])
        if self._dense:
            return memory[self._span, :, : self._longest]
        return memory[:, :, : self._longest].index_select(0, self._slots_S1[:, 0])

    def mask(self, window: int | None) -> tuple[torch.Tensor | None, bool]:
        """Mask [S, 1, M, C] of the group, or None, and whether a plain causal one serves instead."""
        found = self._masks.get(window)
        if found is None:
            found = self._masks[window] = self._mask(window)
        return found

    def _mask(self, window: int | None) -> tuple[torch.Tensor | None, bool]:
        if window is not None and self._longest <= window:
            window = None
        if window is None and self.num_sequences == 1:
            if self.new == 1:
                return None, False
            if self._pasts[0] == 0:
                return None, True
        at_SM = torch.tensor(self._pasts, device=self._device)[:, None] + torch.arange(self.new, device=self._device)
        seen_C = torch.arange(self._longest, device=self._device)
        mask_SMC = seen_C <= at_SM[..., None]
        if window is not None:
            mask_SMC &= seen_C > at_SM[..., None] - window
        return mask_SMC[:, None], False


class Way:
    """How one batch of new tokens is attended to, worked out once for all blocks."""

    def __init__(self, extension: Extension, device: torch.device) -> None:
        members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for number, (new, cache) in enumerate(zip(extension.lengths, extension.caches, strict=True)):
            members[id(cache.slab), new].append(number)
        self.groups: list[Group] = []
        starts = [0]
        for new in extension.lengths:
            starts.append(starts[-1] + new)
        for (_, new), numbers in members.items():
            ordered = sorted(numbers, key=lambda number: extension.caches[number].slot)
            caches = [extension.caches[number] for number in ordered]
            whole = len(members) == 1 and ordered == list(range(len(extension.lengths)))
            rows = None if whole else torch.cat([torch.arange(starts[n], starts[n + 1]) for n in ordered]).to(device)
            self.groups.append(Group(caches, new, rows, device))
