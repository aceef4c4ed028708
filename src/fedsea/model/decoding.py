"""Sessions that decode through a trunk: their caches, and one batch of new tokens of many of them.

Used by the server's sessions and by a trunk in the client's own process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedsea.errors import CapacityError, FedseaError, NonFiniteError, ProtocolError
from fedsea.model.cache import Extension, Frozen, SequenceCache
from fedsea.model.segments import Trunk
from fedsea.model.slabs import capacity_for
from fedsea.model.trunk import CachedPart
from fedsea.types import BlockRange

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Memory:
    """What a trunk keeps for one session.

    Attributes:
        caches: One for each sequence.
        blocks: Blocks that it runs through.
        max_tokens: Most tokens of each sequence, as it was agreed on.
        frozen: The trunk's adapters as this session sees them.
    """

    caches: list[SequenceCache]
    blocks: BlockRange
    max_tokens: int
    frozen: Frozen = field(repr=False)

    @property
    def held(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(cache.length for cache in self.caches)

    @property
    def num_tokens(self) -> int:
        """Of the room that its sequences need."""
        return len(self.caches) * capacity_for(self.max_tokens)

    def close(self) -> None:
        """Give the pages back."""
        for cache in self.caches:
            cache.close()


@dataclass(frozen=True, slots=True)
class Turn:
    """New tokens of one session; see `wire.messages.SessionForward` for the fields."""

    memory: Memory
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    hidden_TH: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def check(self) -> None:
        """Whether this can be done to what the session holds now; nothing is changed.

        Raises:
            ProtocolError: It is for other sequences, or leaves out tokens.
            CapacityError: The session would grow longer than it may.
        """
        memory, count = self.memory, len(self.memory.caches)
        if len(self.lengths) != count or len(self.positions) != count or len(self.sources) not in (0, count):
            raise ProtocolError(f"A message of a session with {count} sequences is for {len(self.lengths)}.")
        if any(source >= count for source in self.sources):
            raise ProtocolError("A sequence cannot take over from one that the session does not have.")
        for number, (position, length) in enumerate(zip(self.positions, self.lengths, strict=True)):
            held = memory.caches[self.sources[number] if self.sources else number].length
            if position > held:
                raise ProtocolError(
                    f"A message begins at token {position} of a sequence of which {held} are held: it came out of "
                    "order."
                )
            if position + length > memory.max_tokens:
                raise CapacityError(
                    f"A sequence would have {position + length} tokens, and its session was opened for "
                    f"{memory.max_tokens}: open it with more max_tokens, or ask for a shorter answer."
                )

    def settle(self) -> CachedPart:
        """Go back to the positions, with what other sequences hold if so asked; call `check` before."""
        memory = self.memory
        if self.sources:
            memory.caches = rearranged(memory.caches, self.sources)
        for cache, position in zip(memory.caches, self.positions, strict=True):
            cache.rollback(position)
        return CachedPart(self.hidden_TH, Extension.of(self.lengths, memory.caches), memory.blocks)


def rearranged(caches: Sequence[SequenceCache], sources: Sequence[int]) -> list[SequenceCache]:
    """Who goes on with whose past: the first claimant of a cache gets it, further ones a copy in an unclaimed one."""
    spare = [cache for number, cache in enumerate(caches) if number not in sources]
    taken: set[int] = set()
    arranged = []
    for source in sources:
        cache = caches[source]
        if source in taken:
            copy = spare.pop()
            copy.take_over(cache)
            cache = copy
        taken.add(source)
        arranged.append(cache)
    return arranged


class TrunkDecoder:
    """Decodes through a trunk; to be used by one thread at a time, except for opening, closing, and what either costs.

    Args:
        trunk: The trunk segment, adapters attached.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self._token_bytes = 0

    @property
    def token_bytes(self) -> int:
        """Memory for one token of one sequence in all blocks; found by running one."""
        if not self._token_bytes:
            trunk = self.trunk
            cache = trunk.open_cache(1)
            hidden_TH = torch.zeros(1, trunk.hidden_size, device=trunk.device)
            with torch.inference_mode():
                trunk.extend_group([CachedPart(hidden_TH, Extension((1,), (cache,)), trunk.range)], trunk.freeze())
            self._token_bytes = cache.slab.num_bytes // cache.slab.num_tokens
            cache.close()
        return self._token_bytes

    def bound(self, max_bytes: int) -> None:
        """Let the caches never take more memory than this: `open` raises CapacityError instead."""
        self.trunk.arena.bound(self.token_bytes, max_bytes)

    def bytes_for(self, num_sequences: int, max_tokens: int) -> int:
        """Memory that a session needs at least; more is charged where it begins a slab of which others get a part."""
        return num_sequences * capacity_for(max_tokens) * self.token_bytes

    def fits(self, num_sequences: int, max_tokens: int) -> bool:
        """Whether `open` would find memory now; of bounded caches."""
        return self.trunk.arena.room_for(capacity_for(max_tokens)) >= num_sequences

    def open(self, num_sequences: int, max_tokens: int, blocks: BlockRange, frozen: Frozen) -> Memory:
        """An empty session.

        Raises:
            ConfigError: The model cannot decode with a cache, or not so far.
            CapacityError: There is no memory for it at the moment; nothing is set aside then.
        """
        memory = Memory([], blocks, max_tokens, frozen)
        try:
            for _ in range(num_sequences):
                memory.caches.append(self.trunk.open_cache(max_tokens))
        except Exception:
            memory.close()
            raise
        return memory

    @torch.inference_mode()
    def run(self, turns: Sequence[Turn]) -> list[torch.Tensor | FedseaError]:
        """New tokens of several sessions, as one batch for each state of the adapters.

        Args:
            turns: At most one of each session.

        Returns:
            For each, hidden states [T, H] at the end of its blocks, or why there are none; a session that failed is to
            be closed, the others are not concerned.
        """
        results: dict[int, torch.Tensor | FedseaError] = {}
        batches: dict[int, list[tuple[int, CachedPart]]] = {}
        for number, turn in enumerate(turns):
            try:
                turn.check()
                part = turn.settle()
            except Exception as error:  # noqa: BLE001 (told to whose tokens they were, and logged)
                results[number] = reason_of(error)
            else:
                batches.setdefault(id(turn.memory.frozen), []).append((number, part))
        for numbered in batches.values():
            frozen = turns[numbered[0][0]].memory.frozen
            outcome = self._batch([part for _, part in numbered], frozen)
            for (number, _), result in zip(numbered, outcome, strict=True):
                results[number] = result
        return [results[number] for number in range(len(turns))]

    def _batch(self, parts: list[CachedPart], frozen: Frozen) -> list[torch.Tensor | FedseaError]:
        try:
            device = self.trunk.device
            outputs = self.trunk.extend_group([_on(part, device) for part in parts], frozen)
            finite = _finite(outputs)  # a device tells of what went wrong before only when it is asked for a number
        except Exception as error:  # noqa: BLE001 (told to whose tokens they were, and logged)
            for part in parts:
                _wipe(part)
            if len(parts) > 1:  # whoever is at fault fails alone
                return [result for part in parts for result in self._batch([part], frozen)]
            return [reason_of(error)]
        return [_outcome(part, output, good) for part, output, good in zip(parts, outputs, finite, strict=True)]


def _finite(outputs: Sequence[torch.Tensor]) -> list[bool]:
    """Of each output; usually found by one look at all of them."""
    together = torch.cat(list(outputs)) if len(outputs) > 1 else outputs[0]
    if math.isfinite(float(together.sum(dtype=torch.float32))):
        return [True] * len(outputs)
    return [bool(torch.isfinite(output).all()) for output in outputs]


def _outcome(part: CachedPart, output: torch.Tensor, good: bool) -> torch.Tensor | FedseaError:
    if good:
        part.extension.commit()
        return output
    _wipe(part)
    return NonFiniteError(
        "The trunk's output for this session is not finite: use bf16 or fp32 instead of fp16, or another model."
    )


def _wipe(part: CachedPart) -> None:
    """Undo the writing of tokens that came to nothing; a device that cannot even do that runs nobody's tokens."""
    try:
        part.extension.wipe()
    except Exception as error:
        log.error("a session's tokens could not be wiped", exc_info=error)


def reason_of(error: Exception) -> FedseaError:
    """What a client is told of an error; the log has what is not for it."""
    if isinstance(error, FedseaError):
        return error
    log.error("a session could not be served", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return CapacityError("The server ran out of memory; try again later.", 5.0)
    return FedseaError("The server could not run this and logged why; tell its operator.")


def _on(part: CachedPart, device: torch.device) -> CachedPart:
    if part.hidden_TH.device == device:
        return part
    return CachedPart(part.hidden_TH.to(device), part.extension, part.blocks)
