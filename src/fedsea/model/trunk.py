"""Several clients through one trunk: members enter and leave at different blocks, the common middle is one batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from fedsea.errors import ConfigError
from fedsea.model.cache import Extension
from fedsea.model.partition import BlockList, cut_config, cut_per_layer_lists
from fedsea.types import BlockRange

RunStage: TypeAlias = Callable[[BlockRange, torch.Tensor, Sequence[int]], torch.Tensor]
ExtendStage: TypeAlias = Callable[[BlockRange, torch.Tensor, Extension], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrunkPart:
    """One member of a group.

    Attributes:
        hidden_TH: Its hidden states.
        lengths: Tokens of each of its sequences.
        blocks: Blocks of the full model that it runs through.
    """

    hidden_TH: torch.Tensor
    lengths: Sequence[int]
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class CachedPart:
    """New tokens of one member of a group.

    Attributes:
        hidden_TH: Their hidden states.
        extension: How many are of which sequence, and what came before.
        blocks: Blocks of the full model that they run through.
    """

    hidden_TH: torch.Tensor
    extension: Extension
    blocks: BlockRange


def stage_of(decoder: nn.Module, list_name: str, held: BlockRange, blocks: BlockRange) -> nn.Module:
    """A decoder that runs some of the blocks of another one, and is made of the very same modules.

    It is made anew for each use: adapters may replace modules of the decoder at any time.

    Args:
        decoder: The decoder of a trunk.
        list_name: Name of its block list.
        held: Blocks that the decoder has.
        blocks: Blocks to run, inside `held`.
    """
    if blocks == held:
        return decoder
    stage = copy.copy(decoder)
    stage.__dict__["_modules"] = dict(decoder._modules)
    whole = decoder.get_submodule(list_name)
    assert isinstance(whole, BlockList)
    stage._modules[list_name] = whole.stage(blocks.start, blocks.stop)
    start, stop = blocks.start - held.start, blocks.stop - held.start
    cut_per_layer_lists(stage, len(held), start, stop)
    stage.__dict__["config"] = cut_config(decoder.config, start, stop)
    return stage


def run_group(parts: Sequence[TrunkPart], run: RunStage) -> list[torch.Tensor]:
    """Run members together wherever their ranges overlap, in one autograd graph.

    Between any two neighbouring boundaries of all ranges the members are the same, and run as one batch.

    Args:
        parts: The members.
        run: Runs a batch through some blocks.

    Returns:
        Each member's hidden states after its own last block. Their gradients are independent of one another.
    """

    def through(stage: BlockRange, hidden_TH: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        return run(stage, hidden_TH, [length for i in members for length in parts[i].lengths])

    return _by_stages(parts, through)


def extend_group(parts: Sequence[CachedPart], extend: ExtendStage) -> list[torch.Tensor]:
    """As `run_group`, for new tokens of sequences that have caches.

    Args:
        parts: The members.
        extend: Runs new tokens through some blocks.
    """

    def through(stage: BlockRange, hidden_TH: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        return extend(stage, hidden_TH, together([parts[i].extension for i in members]))

    return _by_stages(parts, through)


def together(extensions: Sequence[Extension]) -> Extension:
    """The sequences of several extensions as one batch."""
    if len(extensions) == 1:
        return extensions[0]
    lengths = tuple(length for extension in extensions for length in extension.lengths)
    return Extension(lengths, tuple(cache for extension in extensions for cache in extension.caches))


def _by_stages(
    parts: Sequence[TrunkPart | CachedPart],
    through: Callable[[BlockRange, torch.Tensor, Sequence[int]], torch.Tensor],
) -> list[torch.Tensor]:
    if not parts:
        raise ConfigError("A group needs at least one member.")
    hidden = [part.hidden_TH for part in parts]
    edges = sorted({edge for part in parts for edge in (part.blocks.start, part.blocks.stop)})
    for start, stop in itertools.pairwise(edges):
        stage = BlockRange(start, stop)
        members = [i for i, part in enumerate(parts) if part.blocks.covers(stage)]
        if not members:
            continue
        if len(members) == 1:
            hidden[members[0]] = through(stage, hidden[members[0]], members)
            continue
        out_TH = through(stage, torch.cat([hidden[i] for i in members]), members)
        for i, own_TH in zip(members, torch.split(out_TH, [hidden[i].shape[0] for i in members]), strict=True):
            hidden[i] = own_TH
    return hidden
