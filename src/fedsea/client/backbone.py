"""A split model up to its head, as one module: what transformers and trl call a causal model's backbone.

B  rows of a padded batch, S  its columns, H  hidden size, T  tokens of all sequences end to end
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from fedsea.client.decoding import SplitDecoder
from fedsea.client.padding import Cells, cells_of
from fedsea.client.through_trunk import ThroughTrunk
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone(nn.Module):
    """Input blocks, trunk, output blocks and final norm; gradients pass through all of them.

    Args:
        decoder: The split model.
    """

    def __init__(self, decoder: SplitDecoder) -> None:
        super().__init__()
        self.input_blocks: PreTrainedModel = decoder.segments.input_blocks.model
        self.output_blocks: PreTrainedModel = decoder.segments.output_blocks.model
        self._decoder = decoder
        self._through = ThroughTrunk(decoder)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states [B, S, H], zero where there is padding; without a cache.

        Args:
            input_ids: [B, S].
            attention_mask: 0 where there is padding.
            position_ids: See `padding.cells_of`.
            others: As for `refuse`.

        Raises:
            ConfigError: The inputs cannot be used; the message says why.
            FedseaError: The trunk is lost.
        """
        ids_BS = refuse(input_ids, others)
        cells = cells_of(ids_BS, attention_mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=cells.spread(self.run(ids_BS, cells)))

    def run(self, input_ids_BS: torch.Tensor, cells: Cells) -> torch.Tensor:
        """Final hidden states [T, H] of the cells with a token."""
        decoder, segments = self._decoder, self._decoder.segments
        ids_T = cells.pack(input_ids_BS).to(segments.device)
        with decoder.lock:
            hidden_TH = segments.input_blocks(ids_T, cells.lengths)
        hidden_TH = self._through(hidden_TH, cells.lengths)
        with decoder.lock:
            return segments.output_blocks.final(hidden_TH, cells.lengths)


def refuse(input_ids: torch.Tensor | None, others: Mapping[str, Any]) -> torch.Tensor:
    """The token ids, if nothing was asked for that a split model cannot do; what does not matter to it is ignored.

    Raises:
        ConfigError: Says what cannot be done, and why.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if others.get(name):
            raise ConfigError(f"{name} cannot be had of a split model: most of its blocks are at the server.")
    if input_ids is None:
        raise ConfigError("A split model needs input_ids: its embedding is part of what it runs.")
    return input_ids
