"""Running a decoder on packed sequences: T rows without padding in, T rows out.

Sequences of one length run as a plain batch. Unequal ones run end to end as one row, longest first, with
attention that looks at one sequence at a time (`model.attention`). A family without such attention gets a
right-padded batch, made here and gone when this module is left.

    B  sequences, L  tokens of the longest
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedsea.errors import ConfigError
from fedsea.model.attention import Segments, attend_within
from fedsea.model.cache import EXTENDING, CacheArena, Extension, ExtensionCache

log = logging.getLogger(__name__)

_LEAK = 0.25
"""Share of a block's contribution that another sequence would have to change to be noticed; rounding stays below."""
_LOSS = 0.1
"""Share of a block's contribution that may be lost by going on from what is kept of a sequence; likewise."""


@dataclass(frozen=True)
class Packing:
    """How the rows of one micro-batch go through a decoder.

    Attributes:
        lengths: Tokens of each sequence, in the caller's order.
        segments: Lengths in the order of the run; None if all are equal.
        positions: Position of each row in its sequence: [1, L] if all lengths are equal, else [1, T].
        order_T: Row of the caller for each row of the run, or None if they are the same.
        place_T: Inverse of `order_T`.
        slots_T: Row of each token in a batch padded to [B, L].
    """

    lengths: tuple[int, ...]
    segments: Segments | None
    positions: torch.Tensor
    order_T: torch.Tensor | None
    place_T: torch.Tensor | None
    slots_T: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)


@functools.lru_cache(maxsize=256)
def packing(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """The way of a micro-batch; worked out once for all blocks and steps that see these lengths.

    Raises:
        ConfigError: No sequence, or an empty one.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError("A micro-batch needs at least one sequence, and every sequence at least one token.")
    # The first to see these lengths may be an inference; what is kept has to serve training too.
    with torch.inference_mode(False):
        return _pack(lengths, device)


def _pack(lengths: tuple[int, ...], device: torch.device) -> Packing:
    longest = max(lengths)
    slots_T = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    if min(lengths) == longest:
        return Packing(lengths, None, torch.arange(longest, device=device)[None], None, None, slots_T.to(device))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows = torch.split(torch.arange(sum(lengths)), list(lengths))
    order_T = torch.cat([rows[i] for i in order])
    sorted_lengths = tuple(lengths[i] for i in order)
    moved = sorted_lengths != lengths
    return Packing(
        lengths=lengths,
        segments=Segments.of(sorted_lengths),
        positions=torch.cat([torch.arange(n) for n in sorted_lengths])[None].to(device),
        order_T=order_T.to(device) if moved else None,
        place_T=order_T.argsort().to(device) if moved else None,
        slots_T=slots_T.to(device),
    )


def run(decoder: nn.Module, hidden_TH: torch.Tensor, lengths: Sequence[int], *, padded: bool) -> torch.Tensor:
    """Run a decoder (whole or cut) on embeddings or hidden states.

    Args:
        decoder: transformers' decoder, taking `inputs_embeds`.
        hidden_TH: Rows of all sequences, end to end.
        lengths: Tokens of each sequence.
        padded: The decoder's attention cannot keep packed sequences apart.

    Returns:
        The decoder's last hidden state, [T, H].

    Raises:
        ConfigError: The lengths do not add up to the rows.
    """
    way = packing(tuple(lengths), hidden_TH.device)
    if hidden_TH.dim() != 2 or hidden_TH.shape[0] != way.num_tokens:
        raise ConfigError(f"{way.num_tokens} tokens were announced, but the tensor has shape {tuple(hidden_TH.shape)}.")
    if way.segments is None:
        hidden_BLH = hidden_TH.reshape(len(way.lengths), -1, hidden_TH.shape[1])
        return call(decoder, hidden_BLH, way.positions, None).flatten(0, 1)
    if padded:
        return _run_padded(decoder, hidden_TH, way)
    if way.order_T is not None and way.place_T is not None:
        with attend_within(way.segments):
            out_1TH = call(decoder, hidden_TH.index_select(0, way.order_T)[None], way.positions, None)
        return out_1TH[0].index_select(0, way.place_T)
    with attend_within(way.segments):
        return call(decoder, hidden_TH[None], way.positions, None)[0]


def _run_padded(decoder: nn.Module, hidden_TH: torch.Tensor, way: Packing) -> torch.Tensor:
    num_sequences, longest = len(way.lengths), max(way.lengths)
    rows = num_sequences * longest
    padded = hidden_TH.new_zeros(rows, hidden_TH.shape[1]).index_copy(0, way.slots_T, hidden_TH)
    mask = torch.zeros(rows, dtype=torch.long, device=hidden_TH.device).index_fill(0, way.slots_T, 1)
    positions = torch.arange(longest, device=hidden_TH.device).expand(num_sequences, -1)
    out_BLH = call(decoder, padded.view(num_sequences, longest, -1), positions, mask.view(num_sequences, longest))
    return out_BLH.flatten(0, 1).index_select(0, way.slots_T)


def extend(decoder: nn.Module, hidden_TH: torch.Tensor, extension: Extension) -> torch.Tensor:
    """Run a decoder on new tokens of several sequences; their caches take the new keys and values.

    Nothing counts until `Extension.commit`: a run that fails leaves the sequences as they were.

    Args:
        decoder: As for `run`; its attention must be one of `model.attention`.
        hidden_TH: Rows of all sequences, end to end.
        extension: How many are whose, and what came before.
    """
    token = EXTENDING.set(extension)
    try:
        positions = extension.positions(hidden_TH.device)
        return call(decoder, hidden_TH[None], positions, None, ExtensionCache())[0]
    finally:
        EXTENDING.reset(token)


def call(
    decoder: nn.Module,
    hidden_BLH: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    cache: ExtensionCache | None = None,
) -> torch.Tensor:
    """A decoder's last hidden state [B, L, H] of rows that are laid out already."""
    arguments: dict[str, Any] = {"position_ids": positions} if _takes_positions(type(decoder).forward) else {}
    if cache is not None:
        arguments["cache"] = cache
    out = decoder(inputs_embeds=hidden_BLH, attention_mask=mask, use_cache=cache is not None, **arguments)
    last: torch.Tensor = out[0]
    return last


@functools.cache
def _takes_positions(forward: Callable[..., object]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def keeps_apart(
    through: Callable[[torch.Tensor, Sequence[int]], torch.Tensor], width: int, device: torch.device
) -> bool:
    """Whether two sequences come out of a pack as they come out alone.

    Args:
        through: Runs packed rows of given lengths.
        width: Columns of its input.
        device: Where it runs.
    """
    hidden_TH = _some_rows(5, width, device)
    with torch.no_grad():
        packed = torch.split(through(hidden_TH, [3, 2]), [3, 2])
        for part_TH, together in zip(torch.split(hidden_TH, [3, 2]), packed, strict=True):
            alone = through(part_TH, [len(part_TH)])
            change = alone - part_TH if alone.shape == part_TH.shape else alone
            if (together - alone).float().norm() > _LEAK * change.float().norm():
                return False
    return True


def remembers(
    through: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    extending: Callable[[torch.Tensor, Extension], torch.Tensor],
    width: int,
    device: torch.device,
) -> bool:
    """Whether a sequence that comes in two extensions comes out as it does at once.

    Args:
        through: Runs packed rows of given lengths through one block.
        extending: Runs new rows through the same block.
        width: Columns of its input.
        device: Where it runs.
    """
    # Twice: between two experts that are almost alike, rounding may choose otherwise, but hardly for every draw.
    return any(_remembers(through, extending, _some_rows(5, width, device, seed)) for seed in (0, 1))


def _remembers(
    through: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    extending: Callable[[torch.Tensor, Extension], torch.Tensor],
    hidden_TH: torch.Tensor,
) -> bool:
    cache = CacheArena(1).open(len(hidden_TH))
    with torch.no_grad():
        at_once = through(hidden_TH, [len(hidden_TH)])
        try:
            for part_TH in torch.split(hidden_TH, [3, 2]):
                extension = Extension((len(part_TH),), (cache,))
                last_TH = extending(part_TH, extension)
                extension.commit()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any failure of foreign code means the same
            log.debug("this model cannot decode with a cache: its blocks failed with one", exc_info=error)
            return False
    wanted_TH = at_once[3:]
    change = wanted_TH - hidden_TH[3:] if wanted_TH.shape == hidden_TH[3:].shape else wanted_TH
    return not bool((last_TH - wanted_TH).float().norm() > _LOSS * change.float().norm())


def _some_rows(num: int, width: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    # Small, so that in half precision too the block's own contribution stands out: norms undo the scale.
    return (0.05 * torch.randn(num, width, generator=torch.Generator().manual_seed(seed))).to(device)
