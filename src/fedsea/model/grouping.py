"""How new tokens of several sequences are attended to: in which order they run, and which of them in one call.

Sequences of one slab with equally many new tokens are a group: their keys and values are written at once. Those whose
slots lie side by side, and whose lengths are not too different, are a run: they are attended to at once, on the slab as
it is. Slots in between, and positions that a shorter sequence has not reached, are computed with them and masked, as
long as that costs less than a call of its own.

S  slots of a run, M  new tokens of each sequence, T  rows, N  key/value heads, C  longest so far, D  head size
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch

from fedsea.model.cache import Extension, SequenceCache
from fedsea.model.slabs import Slab

_CALL_BYTES = {"cpu": 300 << 10, "cuda": 64 << 20}
"""Keys and values that are read in the time in which one more call is made."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Run:
    """Sequences of a group that are attended to in one call.

    Attributes:
        rows: Rows of the batch that are theirs.
        new: M.
        num_slots: S.
    """

    def __init__(self, caches: Sequence[SequenceCache], new: int, first_row: int, device: torch.device) -> None:
        self.new = new
        self.rows = slice(first_row, first_row + new * len(caches))
        first, last = caches[0].slot, caches[-1].slot
        self.num_slots = last - first + 1
        self._span = slice(first, last + 1)
        self._device = device
        self._longest = max(cache.length for cache in caches) + new
        self._pasts = [0] * self.num_slots
        for cache in caches:
            self._pasts[cache.slot - first] = cache.length
        self._even = self.num_slots == len(caches) and min(self._pasts) == max(self._pasts)
        self._places: torch.Tensor | None = None
        if self.num_slots > len(caches):
            places = [(cache.slot - first) * new + i for cache in caches for i in range(new)]
            self._places = torch.tensor(places, device=device)
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._biases: dict[int | None, torch.Tensor | None] = {}

    def of(self, memories: Pair) -> Pair:
        """This run's keys and values so far, [S, N, C, D] each; views."""
        keys, values = memories
        return keys[self._span, :, : self._longest], values[self._span, :, : self._longest]

    def spread(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Rows in their slots' places, zeros for slots of others."""
        if self._places is None:
            return rows_T
        return rows_T.new_zeros(self.num_slots * self.new, *rows_T.shape[1:]).index_copy_(0, self._places, rows_T)

    def gather(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Back from the slots' places."""
        return rows_T if self._places is None else rows_T.index_select(0, self._places)

    def mask(self, window: int | None) -> tuple[torch.Tensor | None, bool]:
        """Which keys count, [S, 1, M, C] or None for all of them, and whether a plain causal mask serves instead."""
        if self._even and self._pasts[0] == 0 and self.new > 1 and (window is None or self._longest <= window):
            return None, True
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window], False

    def bias(self, window: int | None) -> torch.Tensor | None:
        """The mask [S, 1, M, C] as something to add to scores, or None."""
        if window not in self._biases:
            mask = self._mask(window)
            if mask is not None:
                bias = torch.zeros(mask.shape, device=self._device)
                self._biases[window] = bias.masked_fill_(~mask, float("-inf"))
            else:
                self._biases[window] = None
        return self._biases[window]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        if window is not None and self._longest <= window:
            window = None
        if window is None and self._even and self.new == 1:
            return None
        at_SM = torch.tensor(self._pasts, device=self._device)[:, None]
        if self.new > 1:
            at_SM = at_SM + torch.arange(self.new, device=self._device)
        seen_C = torch.arange(self._longest, device=self._device)
        mask_SMC = seen_C <= at_SM[..., None]
        if window is not None:
            mask_SMC &= seen_C > at_SM[..., None] - window
        return mask_SMC[:, None]


class Group:
    """Sequences of one slab with equally many new tokens, in the order of their slots.

    Attributes:
        rows: Rows of the batch that are theirs.
        runs: What is attended to at once.
    """

    def __init__(
        self, caches: Sequence[SequenceCache], new: int, first_row: int, device: torch.device, token_bytes: int
    ) -> None:
        self.rows = slice(first_row, first_row + new * len(caches))
        self.runs: list[Run] = []
        for members in _runs(caches, new, _CALL_BYTES.get(device.type, 0) // token_bytes):
            self.runs.append(Run(members, new, first_row, device))
            first_row += new * len(members)
        self._new = new
        self._slab: Slab = caches[0].slab
        self._slot, self._past = caches[0].slot, caches[0].length
        self._num_sequences = len(caches)
        self._places_by_heads: dict[int, torch.Tensor] = {}
        if len(caches) > 1:
            self._slots_S1 = torch.tensor([cache.slot for cache in caches], device=device)[:, None]
            self._at_SM = torch.tensor([cache.length for cache in caches], device=device)[:, None]
            if new > 1:
                self._at_SM = self._at_SM + torch.arange(new, device=device)

    def write(self, block: int, keys_TND: torch.Tensor, values_TND: torch.Tensor) -> Pair:
        """Put new keys and values into their slots.

        Returns:
            The slab's memory of this block.
        """
        memories = self._slab.of(block, keys_TND.transpose(0, 1), values_TND.transpose(0, 1))
        for memory, new_TND in zip(memories, (keys_TND, values_TND), strict=True):
            if self._num_sequences == 1:
                memory[self._slot, :, self._past : self._past + self._new] = new_TND.transpose(0, 1)
            else:
                places = self._places(memory)
                memory.view(-1, memory.shape[-1]).index_copy_(0, places, new_TND.reshape(len(places), -1))
        return memories

    def _places(self, memory: torch.Tensor) -> torch.Tensor:
        """Where in the memory as rows [slots N C, D] the new rows [S M N] go; it depends on N alone."""
        heads, capacity = memory.shape[1:3]
        if heads not in self._places_by_heads:
            heads_N = torch.arange(heads, device=memory.device)
            places_SMN = (self._slots_S1[..., None] * heads + heads_N) * capacity + self._at_SM[..., None]
            self._places_by_heads[heads] = places_SMN.flatten()
        return self._places_by_heads[heads]


def _runs(caches: Sequence[SequenceCache], new: int, call_tokens: int) -> list[list[SequenceCache]]:
    """Cut a group where going on would compute more tokens for nothing than a call costs."""
    runs: list[list[SequenceCache]] = []
    longest = wasted = 0
    for cache in caches:
        length = cache.length + new
        if runs:
            run = runs[-1]
            between = cache.slot - run[-1].slot - 1
            slots = run[-1].slot - run[0].slot + 1
            grown = max(longest, length)
            now = wasted + slots * (grown - longest) + between * grown + grown - length
            if now - wasted <= call_tokens:
                run.append(cache)
                longest, wasted = grown, now
                continue
        runs.append([cache])
        longest, wasted = length, 0
    return runs


class Way:
    """How one batch of new tokens is attended to, worked out once for all blocks.

    Args:
        extension: The new tokens.
        device: Where they run.
        token_bytes: Keys and values of one token in one block.

    Attributes:
        extension: The same, in the order in which they run.
        order_T: Row of the caller for each row of the run, or None if they are the same.
        place_T: Inverse of `order_T`.
    """

    def __init__(self, extension: Extension, device: torch.device, token_bytes: int) -> None:
        members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for number, (new, cache) in enumerate(zip(extension.lengths, extension.caches, strict=True)):
            members[id(cache.slab), new].append(number)
        self.groups: list[Group] = []
        ordered: list[int] = []
        first_row = 0
        for (_, new), numbers in members.items():
            numbers.sort(key=lambda number: extension.caches[number].slot)
            caches = [extension.caches[number] for number in numbers]
            self.groups.append(Group(caches, new, first_row, device, token_bytes))
            ordered += numbers
            first_row += new * len(numbers)
        self.extension = extension
        self.order_T = self.place_T = None
        if any(number != place for place, number in enumerate(ordered)):
            starts = list(accumulate(extension.lengths, initial=0))
            rows = [row for number in ordered for row in range(starts[number], starts[number + 1])]
            self.order_T = torch.tensor(rows, device=device)
            self.place_T = self.order_T.argsort()
            lengths = tuple(extension.lengths[number] for number in ordered)
            self.extension = Extension(lengths, tuple(extension.caches[number] for number in ordered))
