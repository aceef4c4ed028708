"""Keys and values of past tokens, and what runs on new tokens of several sequences at once.

Every sequence has a slot of its own, for its own length; what is batched are the rows. So sequences join and leave at
every step, and nothing is moved or copied when they do. Memory is counted in pages of `PAGE_TOKENS` tokens.

    T  new tokens of all sequences end to end, N  key/value heads, C  capacity in tokens, D  head size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from fedsea.errors import CapacityError, ConfigError

PAGE_TOKENS = 32
"""Tokens of a page."""

_SLOTS = 16
_SLAB_TOKENS = 64 << 10
"""Most tokens of a slab, if that is more than one sequence."""


def pages_for(num_tokens: int) -> int:
    """Pages that are set aside for a sequence of so many tokens: a power of two, so that rooms can be used again.

    >>> pages_for(1), pages_for(32), pages_for(33), pages_for(300)
    (1, 1, 2, 16)
    """
    return 1 << (-(-num_tokens // PAGE_TOKENS) - 1).bit_length()


class Slab:
    """Memory for several sequences of one capacity, so that one attention call serves them all.

    A block's part is made when the first token reaches that block; on a CPU the system gives memory for it only as it
    is written.

    Attributes:
        capacity: Most tokens of a sequence.
        free: Slots that no sequence has.
    """

    def __init__(self, num_blocks: int, capacity: int) -> None:
        self.capacity = capacity
        self.num_slots = max(1, min(_SLOTS, _SLAB_TOKENS // capacity))
        self.free = list(range(self.num_slots))[::-1]
        self._blocks: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_blocks

    def of(self, block: int, keys_NTD: torch.Tensor, values_NTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [slots, N, C, D] of a block, made like these if there are none yet."""
        found = self._blocks[block]
        if found is None:
            found = self._blocks[block] = self._made_like(keys_NTD), self._made_like(values_NTD)
        return found

    def _made_like(self, part_NTD: torch.Tensor) -> torch.Tensor:
        heads, _, size = part_NTD.shape
        # Zeros, because masked values are still multiplied, and garbage may be NaN; the system's pages are zero anyway.
        return torch.zeros(self.num_slots, heads, self.capacity, size, dtype=part_NTD.dtype, device=part_NTD.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy one slot's first tokens to another slot of this slab."""
        for pair in self._blocks:
            for memory in pair or ():
                memory[target, :, :length] = memory[source, :, :length]

    def wipe(self, slot: int, start: int, stop: int) -> None:
        """Make some of a slot's tokens zero again."""
        for pair in self._blocks:
            for memory in pair or ():
                memory[slot, :, start:stop] = 0

    @property
    def num_bytes(self) -> int:
        """Memory at full capacity."""
        held = (memory for pair in self._blocks for memory in pair or ())
        return sum(memory.numel() * memory.element_size() for memory in held)


class CacheArena:
    """The caches of one segment.

    Attributes:
        pages: Pages set aside for sequences at the moment.
    """

    def __init__(self, num_blocks: int) -> None:
        self.pages = 0
        self._num_blocks = num_blocks
        self._slabs: dict[int, list[Slab]] = {}

    def open(self, max_tokens: int) -> SequenceCache:
        """An empty cache for a sequence of at most so many tokens."""
        if max_tokens < 1:
            raise ConfigError("A sequence needs room for at least one token.")
        pages = pages_for(max_tokens)
        slabs = self._slabs.setdefault(pages, [])
        slab = next((slab for slab in slabs if slab.free), None)
        if slab is None:
            slab = Slab(self._num_blocks, pages * PAGE_TOKENS)
            slabs.append(slab)
        self.pages += pages
        # The lowest slot: sequences that lie side by side are attended to without a copy.
        slot = min(slab.free)
        slab.free.remove(slot)
        return SequenceCache(self, slab, slot)

    def close(self, cache: SequenceCache) -> None:
        """Give a sequence's pages back; see `SequenceCache.close`."""
        pages = cache.capacity // PAGE_TOKENS
        self.pages -= pages
        cache.slab.free.append(cache.slot)
        if len(cache.slab.free) == cache.slab.num_slots:
            self._slabs[pages].remove(cache.slab)

    @property
    def num_bytes(self) -> int:
        """Memory of all slabs at full capacity."""
        return sum(slab.num_bytes for slabs in self._slabs.values() for slab in slabs)


class SequenceCache:
    """Keys and values of one sequence in the blocks of one segment; made by `CacheArena.open`.

    Attributes:
        length: Tokens that all blocks hold; whatever lies behind it does not count.
    """

    __slots__ = ("_arena", "_closed", "length", "slab", "slot")

    def __init__(self, arena: CacheArena, slab: Slab, slot: int) -> None:
        self.length = 0
        self.slab = slab
        self.slot = slot
        self._arena = arena
        self._closed = False

    @property
    def capacity(self) -> int:
        """Most tokens."""
        return self.slab.capacity

    def write(self, block: int, keys_NTD: torch.Tensor, values_NTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new tokens' keys and values behind the old ones'.

        Args:
            block: Index in the segment.
            keys_NTD: Of the new tokens.
            values_NTD: Likewise.

        Returns:
            Views of all keys and values so far, new ones included.
        """
        keys, values = self.slab.of(block, keys_NTD, values_NTD)
        stop = self.length + keys_NTD.shape[1]
        keys[self.slot, :, self.length : stop] = keys_NTD
        values[self.slot, :, self.length : stop] = values_NTD
        return keys[self.slot, :, :stop], values[self.slot, :, :stop]

    def rollback(self, length: int) -> None:
        """Forget everything from a position on.

        Raises:
            ConfigError: The cache is shorter.
        """
        if not 0 <= length <= self.length:
            raise ConfigError(f"A cache of {self.length} tokens cannot go back to {length}.")
        self.length = length

    def wipe(self, num_tokens: int) -> None:
        """Undo the writing of new tokens that do not count: what is not finite would reach whoever has the slot next.

        Masked values are multiplied by zero, which removes everything but NaN and infinity.
        """
        self.slab.wipe(self.slot, self.length, min(self.length + num_tokens, self.capacity))

    def take_over(self, other: SequenceCache) -> None:
        """Become a copy of another sequence of this segment.

        Raises:
            ConfigError: It is too long for this one's room.
        """
        if other.length > self.capacity:
            raise ConfigError(f"A sequence of {other.length} tokens does not fit into a room of {self.capacity}.")
        if other.slab is self.slab:
            self.slab.copy(other.slot, self.slot, other.length)
        else:
            for block, pair in enumerate(other.slab._blocks):
                if pair is not None:
                    keys, values = self.slab.of(block, pair[0][0], pair[1][0])
                    keys[self.slot, :, : other.length] = pair[0][other.slot, :, : other.length]
                    values[self.slot, :, : other.length] = pair[1][other.slot, :, : other.length]
        self.length = other.length

    def close(self) -> None:
        """Give the pages back; may be called twice."""
        if not self._closed:
            self._closed = True
            self._arena.close(self)


@dataclass(frozen=True, slots=True)
class Extension:
    """New tokens of several sequences, and what came before them.

    Attributes:
        lengths: New tokens of each sequence.
        caches: What each sequence holds already.
    """

    lengths: tuple[int, ...]
    caches: tuple[SequenceCache, ...]

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.caches) or min(self.lengths) < 1:
            raise ConfigError("Every sequence needs a cache of its own and at least one new token.")
        if len({id(cache) for cache in self.caches}) != len(self.caches):
            raise ConfigError("A sequence stands twice in one batch.")
        for length, cache in zip(self.lengths, self.caches, strict=True):
            if cache.length + length > cache.capacity:
                raise CapacityError(
                    f"A sequence would have {cache.length + length} tokens and has room for {cache.capacity}: open it "
                    "with more max_tokens, or ask for a shorter answer."
                )

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position of each new token in its sequence, [1, T]."""
        pairs = zip(self.lengths, self.caches, strict=True)
        if max(self.lengths) == 1:
            return torch.tensor([[cache.length for _, cache in pairs]], device=device)
        spans = [torch.arange(cache.length, cache.length + new) for new, cache in pairs]
        return torch.cat(spans)[None].to(device)

    def wipe(self) -> None:
        """The new tokens have come to nothing: what was written of them is removed."""
        for length, cache in zip(self.lengths, self.caches, strict=True):
            cache.wipe(length)

    def commit(self) -> None:
        """The new tokens have been through all blocks: they count from now on."""
        for length, cache in zip(self.lengths, self.caches, strict=True):
            cache.length += length


@dataclass(frozen=True, slots=True)
class Frozen:
    """Adapters of a segment as they were at one moment; made by `Segment.freeze`.

    Attributes:
        tensors: By name in the segment's model.
        lean: The same for `model.lean`, whose blocks never read the model's own adapters.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lean: Any = None

    @contextlib.contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Let a model's parameters have these values in this context."""
        parameters = {name: model.get_parameter(name) for name in self.tensors}
        before = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.tensors[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]


EXTENDING: ContextVar[Extension | None] = ContextVar("fedsea_extending", default=None)
"""What the blocks of this context run on; None outside."""


class ExtensionCache(Cache):  # type: ignore[misc]
    """What transformers' blocks see as their cache: it passes the new keys on, and attention finds the old ones."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new ones; `model.attention` writes them to the sequences' own caches."""
        del layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No use: positions are given, and masks are made for each sequence."""
        del layer_idx
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No use, likewise."""
        del layer_idx
        return query_length, 0
