"""What the three parts of a split model share: running packed sequences, caches, precision.

T  tokens of all sequences end to end, H  hidden size, S  sequences, C  candidates
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fedsea.errors import ConfigError
from fedsea.model import temperature
from fedsea.model.attention import SDPA, OwnMaskError
from fedsea.model.cache import CacheArena, Extension, Frozen, SequenceCache
from fedsea.model.lean import LeanBlocks, lean_blocks
from fedsea.model.packing import call, extend, keeps_apart, remembers, run
from fedsea.model.partition import Layout
from fedsea.model.trunk import stage_of
from fedsea.types import BlockRange, SegmentKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Segment:
    """What the three segments share.

    Attributes:
        kind: Which of the three.
        model: The cut `*ForCausalLM`: holds the parameters under the full model's names, in eval mode when loaded.
            Adapters may be injected into it; to be run through this segment only.
        blocks: Original indices of its blocks; may be empty at a client.
    """

    kind: ClassVar[SegmentKind]

    def __init__(
        self, model: PreTrainedModel, layout: Layout, blocks: range, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.blocks = blocks
        self._layout = layout
        self._autocast = autocast
        self._padded = layout.attention is None
        self._remembers = True
        self._lean: LeanBlocks | None = None
        self._lean_known = False

    @property
    def num_parameters(self) -> int:
        """Parameters that this segment holds, adapters included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which hidden states enter the blocks; full training makes it float32."""
        found = max(self._weights(), key=lambda weight: weight.numel(), default=None)
        return torch.float32 if found is None else found.dtype

    @property
    def device(self) -> torch.device:
        """Where the segment lives."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def padded(self) -> bool:
        """Whether unequal sequences run as a padded batch, because the family cannot keep packed ones apart."""
        return self._padded

    @property
    def most_tokens(self) -> int | None:
        """Longest sequence that can be run; None if the model sets no bound."""
        return None if self._layout.reach is None else self._layout.reach.tokens

    def switch(self, *, training: bool) -> None:
        """Dropout and checkpointing on or off in the whole model, at no cost where they are so already."""
        if self.model.training is not training:  # else every one of its modules would be told, at each pass
            self.model.train(training)

    def choose_packing(self) -> None:
        """Try two packed sequences through the first block: a family that lets them see each other is padded instead.

        What a family says about its attention is checked before; this finds what it does not say, for example a
        convolution over time, or positions that it counts itself. Likewise whether a sequence can go on from the keys
        and values that are kept of it: not where a block attends twice.
        """
        if self._padded:
            return
        decoder = self._decoder
        if len(self.blocks) > 1:
            held, first = (BlockRange(self.blocks.start, stop) for stop in (self.blocks.stop, self.blocks.start + 1))
            decoder = stage_of(decoder, self._layout.blocks, held, first)

        def through(hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
            return self._run(decoder, hidden_TH, lengths)

        def extending(hidden_TH: torch.Tensor, extension: Extension) -> torch.Tensor:
            with self._precision(hidden_TH.device):
                return extend(decoder, hidden_TH.to(self.dtype), extension)

        if not keeps_apart(through, self._entering_width, self.device):
            self._padded = True
        self._remembers = self._padded or remembers(through, extending, self._entering_width, self.device)

    @property
    def _entering_width(self) -> int:
        return self.hidden_size

    def _weights(self) -> list[nn.Parameter]:
        # The largest weight of a block is a linear layer's: norms may be kept in float32, adapters always are.
        blocks: nn.Module = getattr(self._decoder, self._layout.blocks)
        return list(blocks[0].parameters() if len(self.blocks) else self.model.parameters())  # type: ignore[index]

    @property
    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.get_submodule(self._layout.decoder)
        return decoder

    def _run(self, decoder: nn.Module, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        reach = self._layout.reach
        if reach is not None and max(lengths, default=0) > reach.tokens:
            raise ConfigError(
                f"A sequence has {max(lengths)} tokens, but {reach.reason}: shorten it to at most {reach.tokens}."
            )
        hidden_TH = hidden_TH.to(self.dtype)
        with self._precision(hidden_TH.device):
            try:
                return run(decoder, hidden_TH, lengths, padded=self._padded)
            except OwnMaskError:
                self._padded = True
                return run(decoder, hidden_TH, lengths, padded=True)

    # --- decoding with caches ---------------------------------------------------------------------------------------

    @property
    def caches(self) -> bool:
        """Whether the blocks can run on new tokens alone: all they keep of a sequence are keys and values."""
        return self._remembers and not self._padded

    @property
    def lean(self) -> bool:
        """Whether new tokens run through `model.lean` instead of the family's own layers."""
        return self._lean_blocks is not None

    @property
    def _lean_blocks(self) -> LeanBlocks | None:
        """As they were when the adapters were frozen last; until then, as the layers are now."""
        return self._lean if self._lean_known else self._refresh_lean()

    def _refresh_lean(self) -> LeanBlocks | None:
        """Look whether layers or weights were replaced, as peft does with what gets an adapter, and follow them."""
        self._lean_known = True
        if self._autocast is not None or not self.caches:
            self._lean = None
            return None
        layers = list(getattr(self._decoder, self._layout.blocks))
        if self._lean is None or not self._lean.is_of(layers):
            with torch.inference_mode(False):  # the weights become views of what is made here, and are trained with
                self._lean = lean_blocks(self._decoder, layers)
        return self._lean

    def open_cache(self, max_tokens: int) -> SequenceCache:
        """An empty cache for one sequence.

        Raises:
            ConfigError: The family keeps something else than keys and values, or has no positions for so many tokens.
            CapacityError: There is no memory for it at the moment.
        """
        if not self.caches:
            lack = "do not go on from one set of keys and values as they would from the whole text"
            if self._padded:
                lack = "do not keep sequences of one batch apart"
            raise ConfigError(
                f"Models of type {self.model.config.model_type!r} cannot decode with a cache here: their blocks "
                f"{lack}. Training and evaluation work."
            )
        if (reach := self._layout.reach) is not None and max_tokens > reach.tokens:
            raise ConfigError(
                f"A sequence of up to {max_tokens} tokens was asked for, but {reach.reason}: shorten prompt or answer, "
                f"to {reach.tokens} together."
            )
        return self.arena.open(max_tokens)

    @functools.cached_property
    def arena(self) -> CacheArena:
        """Where this segment's caches are."""
        return CacheArena(len(self.blocks))

    def freeze(self) -> Frozen:
        """The adapters as they are now, to decode with while training goes on.

        Weights that are trained in full are not copied: they stay what training makes of them.
        """
        if (lean := self._refresh_lean()) is not None:
            return Frozen(lean=lean.adapters())
        return Frozen(tensors={n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n})

    def _extend(
        self,
        decoder: nn.Module,
        hidden_TH: torch.Tensor,
        extension: Extension,
        frozen: Frozen,
        blocks: range | None = None,
    ) -> torch.Tensor:
        if hidden_TH.dim() != 2 or hidden_TH.shape[0] != extension.num_tokens:
            given = tuple(hidden_TH.shape)
            raise ConfigError(f"{extension.num_tokens} tokens were announced, but the tensor has shape {given}.")
        if self._lean_blocks is not None and frozen.lean is not None:
            # Neither mode nor type are asked of the model: going through its modules costs as much as a block.
            indices = range(len(self.blocks)) if blocks is None else blocks
            return self._lean_blocks.run(hidden_TH, extension, indices, frozen.lean)
        hidden_TH = hidden_TH.to(self.dtype)
        self.switch(training=False)
        with self._precision(hidden_TH.device), frozen.swapped_into(self.model):
            try:
                return extend(decoder, hidden_TH, extension)
            except OwnMaskError as error:
                raise ConfigError(f"{error} Such models cannot decode with a cache here.") from error

    # --- searches over the vocabulary -------------------------------------------------------------------------------

    @property
    def branches(self) -> bool:
        """Whether `Branches` can run candidates beside one another, through attention of its own."""
        chunked = "chunked_attention" in (getattr(self.model.config, "layer_types", None) or ())
        tempered = any(temperature.of(module) is not None for module in self.model.modules())
        return self.caches and self._layout.attention == SDPA and not chunked and not tempered

    def run_branches(self, entering: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, C, H] of candidates; for `model.branching` alone."""
        with self._precision(entering.device):
            return call(self._decoder, self._entered(entering).to(self.dtype), positions, None)

    def _entered(self, entering: torch.Tensor) -> torch.Tensor:
        return entering

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self._autocast)
