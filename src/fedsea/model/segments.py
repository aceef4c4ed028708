"""The three parts of a split model, each working on packed micro-batches without padding.

    >>> input_blocks = load_input_blocks(checkpoint, partition, dtype=torch.float32)   # doctest: +SKIP
    >>> hidden_TH = input_blocks(input_ids_T, lengths)                                 # doctest: +SKIP
    >>> hidden_TH = trunk(hidden_TH, lengths)                                          # doctest: +SKIP
    >>> output_blocks.loss(hidden_TH, lengths, targets_T).backward()                   # doctest: +SKIP

T  tokens of all sequences end to end, H  hidden size, V  vocabulary size, B  sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedsea.errors import ConfigError
from fedsea.model.cache import Extension, Frozen
from fedsea.model.head import Logits, head_of, summed_cross_entropy
from fedsea.model.products import FrozenLinear
from fedsea.model.segment import Segment
from fedsea.model.trunk import CachedPart, TrunkPart, extend_group, run_group, stage_of
from fedsea.types import IGNORE, BlockRange, SegmentKind


class InputBlocks(Segment):
    """Embedding and the first blocks, at the client."""

    kind = SegmentKind.INPUT

    def __call__(self, input_ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """As `forward`."""
        return self.forward(input_ids_T, lengths)

    def forward(self, input_ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, H] at the first cut, in the type of the computation.

        Args:
            input_ids_T: Token ids of all sequences, end to end.
            lengths: Tokens of each sequence.

        Raises:
            ConfigError: The lengths do not fit the ids, or one is more than the model has positions for.
        """
        with self._precision(input_ids_T.device):
            hidden_TH = self._embedding(input_ids_T)
        return self._run(self._decoder, hidden_TH, lengths)

    def extend(self, input_ids_T: torch.Tensor, extension: Extension, frozen: Frozen) -> torch.Tensor:
        """Hidden states [T, H] at the first cut of new tokens; `Extension.commit` is left to the caller.

        Args:
            input_ids_T: Ids of the new tokens of all sequences, end to end.
            extension: Whose they are, with caches of this segment.
            frozen: This segment's adapters.
        """
        with self._precision(input_ids_T.device):
            hidden_TH = self._embedding(input_ids_T)
        return self._extend(self._decoder, hidden_TH, extension, frozen)

    def _entered(self, entering: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self._embedding(entering)
        return embedded

    @property
    def _embedding(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    @property
    def _entering_width(self) -> int:
        # Some families embed narrower than the blocks are, and project.
        return int(next(self._embedding.parameters()).shape[1])


class Trunk(Segment):
    """The middle blocks, at the server: neither embedding nor norm nor head."""

    kind = SegmentKind.TRUNK

    @property
    def range(self) -> BlockRange:
        """Its blocks as a range of the full model."""
        return BlockRange(self.blocks.start, self.blocks.stop)

    def __call__(
        self, hidden_TH: torch.Tensor, lengths: Sequence[int], blocks: BlockRange | None = None
    ) -> torch.Tensor:
        """As `forward`."""
        return self.forward(hidden_TH, lengths, blocks)

    def forward(
        self, hidden_TH: torch.Tensor, lengths: Sequence[int], blocks: BlockRange | None = None
    ) -> torch.Tensor:
        """Hidden states [T, H] after `blocks` (all of the trunk's, if not given).

        Raises:
            ConfigError: The trunk does not have these blocks, or the lengths do not fit the rows or the model.
        """
        return self.forward_group([TrunkPart(hidden_TH, lengths, blocks or self.range)])[0]

    def forward_group(self, parts: Sequence[TrunkPart]) -> list[torch.Tensor]:
        """Run members with different block ranges; where ranges overlap, as one batch.

        Args:
            parts: Members in a fixed order; the sums inside a batch follow it.

        Returns:
            Each member's hidden states, in one autograd graph. A gradient for one of them reaches that member's input
            alone, and the trunk's trainable parameters.

        Raises:
            ConfigError: As `forward`.
        """
        for part in parts:
            self._check_range(part.blocks)
        return run_group(parts, self._run_stage)

    def extend_group(self, parts: Sequence[CachedPart], frozen: Frozen) -> list[torch.Tensor]:
        """Run new tokens of members with different block ranges; where ranges overlap, as one batch.

        Args:
            parts: Members in a fixed order.
            frozen: The trunk's adapters.

        Returns:
            Each member's hidden states after its own last block; `Extension.commit` is left to the caller.

        Raises:
            ConfigError: A member asks for blocks that the trunk has not.
        """
        for part in parts:
            self._check_range(part.blocks)

        def through(blocks: BlockRange, hidden_TH: torch.Tensor, extension: Extension) -> torch.Tensor:
            decoder = stage_of(self._decoder, self._layout.blocks, self.range, blocks)
            indices = range(blocks.start - self.blocks.start, blocks.stop - self.blocks.start)
            return self._extend(decoder, hidden_TH, extension, frozen, indices)

        return extend_group(parts, through)

    def _check_range(self, blocks: BlockRange) -> None:
        if not self.range.covers(blocks):
            raise ConfigError(
                f"Blocks {blocks.start}:{blocks.stop} were asked of a trunk that has "
                f"{self.blocks.start}:{self.blocks.stop}."
            )

    def _run_stage(self, blocks: BlockRange, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        decoder = stage_of(self._decoder, self._layout.blocks, self.range, blocks)
        return self._run(decoder, hidden_TH, lengths)


class OutputBlocks(Segment):
    """The last blocks, final norm and head, at the client."""

    kind = SegmentKind.OUTPUT
    _few: tuple[FrozenLinear, Logits] | None = None

    def __call__(self, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """As `forward`."""
        return self.forward(hidden_TH, lengths)

    def forward(self, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] of every row; for training use `loss`, which does not hold them all.

        Raises:
            ConfigError: The lengths do not fit the rows.
        """
        return self.logits(self.final(hidden_TH, lengths))

    def final(self, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, H] after the last block and the final norm; `logits` takes any rows of them.

        Raises:
            ConfigError: The lengths do not fit the rows.
        """
        return self._run(self._decoder, hidden_TH, lengths)

    def last_logits(self, hidden_TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits [B, V] of each sequence's last row; the head runs on these rows alone."""
        out_TH = self._run(self._decoder, hidden_TH, lengths)
        last_B = torch.tensor(lengths, device=out_TH.device).cumsum(0) - 1
        return self.logits(out_TH.index_select(0, last_B))

    def extend(
        self, hidden_TH: torch.Tensor, extension: Extension, frozen: Frozen, rows_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [R, V] of new tokens; `Extension.commit` is left to the caller.

        Args:
            hidden_TH: Hidden states from the trunk, of all sequences end to end.
            extension: Whose they are, with caches of this segment.
            frozen: This segment's adapters.
            rows_R: Rows whose logits are wanted; None takes the last one of each sequence.
        """
        out_TH = self._extend(self._decoder, hidden_TH, extension, frozen)
        if rows_R is None:
            rows_R = torch.tensor(extension.lengths, device=out_TH.device).cumsum(0) - 1
        return self._few_logits(out_TH.index_select(0, rows_R))

    def loss(self, hidden_TH: torch.Tensor, lengths: Sequence[int], targets_T: torch.Tensor) -> torch.Tensor:
        """Sum, in float32, of the cross entropy over rows with a target.

        Args:
            hidden_TH: Hidden states from the trunk.
            lengths: Tokens of each sequence.
            targets_T: Next token of each row, or `IGNORE`; the head runs on rows with a target only.

        Raises:
            ConfigError: The lengths or targets do not fit the rows.
        """
        if targets_T.shape != hidden_TH.shape[:1]:
            raise ConfigError(f"There are {targets_T.numel()} targets for {hidden_TH.shape[0]} rows.")
        out_TH = self._run(self._decoder, hidden_TH, lengths)
        rows = (targets_T != IGNORE).nonzero().squeeze(1)
        if rows.numel() == 0:
            return out_TH.float().sum() * 0.0
        if rows.numel() < out_TH.shape[0]:
            out_TH, targets_T = out_TH.index_select(0, rows), targets_T.index_select(0, rows)
        logits, trained = head_of(self.model, self._layout.decoder)
        with self._precision(out_TH.device):
            return summed_cross_entropy(logits, trained, out_TH, targets_T, self.model.config.vocab_size)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """What the head makes of final hidden states."""
        logits, _ = head_of(self.model, self._layout.decoder)
        with self._precision(hidden_TH.device):
            return logits(hidden_TH)

    def _few_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """As `_logits`; a head that is not trained is read as fast as it can be, and not put together anew."""
        linear = self.model.get_output_embeddings()
        if self._autocast is not None or not FrozenLinear.serves(linear):
            return self.logits(hidden_RH)
        if self._few is None or not self._few[0].is_of(linear):
            fast = FrozenLinear(linear)
            self._few = fast, head_of(self.model, self._layout.decoder, fast)[0]
        return self._few[1](hidden_RH)
