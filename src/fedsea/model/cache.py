"""Keys and values of past tokens, and what runs on new tokens of several sequences at once.

Every sequence has a slot of its own, for its own length; what is batched are the rows. So sequences join and leave at
every step, and nothing is moved or copied when they do. A sequence has pages of `PAGE_TOKENS` tokens set aside; memory
is made, charged and given back by the slab, which is several sequences' room.

    T  new tokens of all sequences end to end, N  key/value heads, C  capacity in tokens, D  head size
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from fedsea.errors import CapacityError, ConfigError
from fedsea.model.slabs import PAGE_TOKENS, Slab, capacity_for

_MOST_SLOTS = 16
_UNBOUNDED_TOKENS = 4 << 10
"""Most tokens of a slab where memory has no bound, if that is more than one sequence."""
_SLAB_SHARE = 16
"""A slab is at most this part of a bounded arena's memory, if that is more than one sequence: few sequences that stay
in many slabs keep what the others leave."""


class CacheArena:
    """The caches of one segment.

    Attributes:
        pages: Pages set aside for sequences at the moment.
    """

    def __init__(self, num_blocks: int) -> None:
        self.pages = 0
        self._num_blocks = num_blocks
        self._slabs: dict[int, list[Slab]] = {}
        self._free_slots: Counter[int] = Counter()
        self._num_tokens = 0
        self._token_bytes = 0
        self._max_bytes = 0

    def bound(self, token_bytes: int, max_bytes: int) -> None:
        """Let `num_bytes` never become more than so much.

        Args:
            token_bytes: Keys and values of one token of one sequence in all blocks.
            max_bytes: The bound.
        """
        self._token_bytes, self._max_bytes = token_bytes, max_bytes

    def open(self, max_tokens: int) -> SequenceCache:
        """An empty cache for a sequence of at most so many tokens.

        Raises:
            CapacityError: There is no room for it within the bound at the moment.
        """
        if max_tokens < 1:
            raise ConfigError("A sequence needs room for at least one token.")
        slab = self._slab_for(capacity_for(max_tokens))
        self.pages += slab.capacity // PAGE_TOKENS
        # The lowest slot: sequences that lie side by side are attended to without a copy.
        slot = min(slab.free)
        slab.free.remove(slot)
        self._free_slots[slab.capacity] -= 1
        return SequenceCache(self, slab, slot)

    def free_slots(self, capacity: int) -> int:
        """Slots of at least this capacity that no sequence has."""
        return sum(num for at, num in self._free_slots.items() if at >= capacity)

    @property
    def free_tokens(self) -> int:
        """Tokens for which a bounded arena could still make slabs."""
        return self._max_bytes // self._token_bytes - self._num_tokens

    def room_for(self, capacity: int) -> int:
        """How many sequences of this capacity a bounded arena could open now."""
        return self.free_slots(capacity) + self.free_tokens // capacity

    def _slab_for(self, capacity: int) -> Slab:
        """A slab with a free slot: of this capacity, or where memory is short also of a larger one."""
        if (slab := self._fullest(capacity)) is not None:
            return slab
        if num_slots := self._slots_of_new(capacity):
            slab = Slab(self._num_blocks, capacity, num_slots)
            self._slabs.setdefault(capacity, []).append(slab)
            self._free_slots[capacity] += num_slots
            self._num_tokens += slab.num_tokens
            return slab
        for larger in sorted(self._slabs):
            if larger > capacity and (slab := self._fullest(larger)) is not None:
                return slab
        raise CapacityError("The memory for keys and values is full at the moment; try again later.", 1.0)

    def _fullest(self, capacity: int) -> Slab | None:
        """Of the slabs with a free slot, the one with fewest, so that others may become empty."""
        free = (slab for slab in self._slabs.get(capacity, ()) if slab.free)
        return min(free, key=lambda slab: len(slab.free), default=None)

    def _slots_of_new(self, capacity: int) -> int:
        if not self._max_bytes:
            return max(1, min(_MOST_SLOTS, _UNBOUNDED_TOKENS // capacity))
        slot_bytes = capacity * self._token_bytes
        wanted = max(1, min(_MOST_SLOTS, self._max_bytes // _SLAB_SHARE // slot_bytes))
        return min(wanted, max(0, self._max_bytes - self.num_bytes) // slot_bytes)

    def close(self, cache: SequenceCache) -> None:
        """Give a sequence's pages back; see `SequenceCache.close`."""
        slab = cache.slab
        self.pages -= slab.capacity // PAGE_TOKENS
        slab.free.append(cache.slot)
        self._free_slots[slab.capacity] += 1
        if len(slab.free) == slab.num_slots:
            self._slabs[slab.capacity].remove(slab)
            self._free_slots[slab.capacity] -= slab.num_slots
            self._num_tokens -= slab.num_tokens
            slab.drop()

    @property
    def num_bytes(self) -> int:
        """Memory of all slabs; in a bounded arena at full capacity, whether it was made yet or not."""
        if self._max_bytes:
            return self._num_tokens * self._token_bytes
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
        self.slab.take_over(self.slot, other.slab, other.slot, other.length)
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

    @classmethod
    def of(cls, lengths: Sequence[int], caches: Sequence[SequenceCache]) -> Extension:
        """Of the sequences that have new tokens, out of as many as there are caches."""
        pairs = [(length, cache) for length, cache in zip(lengths, caches, strict=True) if length]
        return cls(tuple(length for length, _ in pairs), tuple(cache for _, cache in pairs))

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
