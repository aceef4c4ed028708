"""Padded batches, as transformers has them, and the packed rows that run and travel: padding is never computed or sent.

B  rows of a padded batch, S  its columns, T  tokens of all sequences end to end
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsea.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cells:
    """Which cells of a padded batch hold a token, and which of these belong together.

    Attributes:
        mask_BS: True where there is a token.
        lengths: Tokens of each sequence, row by row. A row has one, or several where its positions begin again at 0.
    """

    mask_BS: torch.Tensor
    lengths: tuple[int, ...]

    def pack(self, values_BS: torch.Tensor) -> torch.Tensor:
        """The values [T] of the cells with a token."""
        return values_BS[self.mask_BS]

    def spread(self, values_TX: torch.Tensor) -> torch.Tensor:
        """Values [T, X] at their cells [B, S, X]; zeros elsewhere. Gradients pass."""
        return spread(values_TX, self.mask_BS)


def spread(values_TX: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """See `Cells.spread`."""
    if bool(mask_BS.all()):
        return values_TX.reshape(*mask_BS.shape, -1)
    cells = values_TX.new_zeros(*mask_BS.shape, values_TX.shape[-1])
    cells[mask_BS] = values_TX
    return cells


def mask_of(like_BS: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """An attention mask as booleans [B, S]; without one, every cell holds a token.

    Raises:
        ConfigError: It is no mask of cells, or of other cells.
    """
    if like_BS.dim() != 2:
        raise ConfigError(f"input_ids must have the shape (rows, columns); they have {tuple(like_BS.shape)}.")
    if attention_mask is None:
        return torch.ones_like(like_BS, dtype=torch.bool)
    if attention_mask.shape != like_BS.shape:
        raise ConfigError(
            f"An attention mask has the shape {tuple(attention_mask.shape)} for tokens of {tuple(like_BS.shape)}; only "
            "masks of padding can be used with a split model: the server knows lengths, nothing else."
        )
    return attention_mask.to(torch.bool)


def refuse_padding_at_the_end(attention_mask: object) -> None:
    """What is not computed at padding are its logits too: a prompt that ends in it would have no first new token.

    Args:
        attention_mask: Of prompts, [B, S], if there is one. A row without any token is not looked at.

    Raises:
        ConfigError: A prompt is padded on the right.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1]:
        mask_BS = attention_mask.to(torch.bool)
        if bool((mask_BS.any(1) & ~mask_BS[:, -1]).any()):
            raise ConfigError(
                "A prompt is padded on the right, where its answer begins: pad on the left "
                '(tokenizer.padding_side = "left").'
            )


def cells_of(
    input_ids_BS: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Cells:
    """Where the tokens of a batch are.

    Args:
        input_ids_BS: Token ids, padded.
        attention_mask: 0 where there is padding; None: nowhere.
        position_ids: [1 or B, S], counting from 0 in each sequence; where they begin again at 0 in the middle of a row,
            a new sequence begins ("padding-free" batches).

    Raises:
        ConfigError: The positions are others, or there is no token at all.
    """
    mask_BS = mask_of(input_ids_BS, attention_mask)
    counts = mask_BS.sum(1).tolist()
    if not sum(counts):
        raise ConfigError("There is no token: a batch needs at least one.")
    if position_ids is None:
        return Cells(mask_BS, tuple(count for count in counts if count))
    positions_T = position_ids.expand_as(mask_BS)[mask_BS].cpu()
    begins_T = positions_T == 0
    starts = {sum(counts[:row]) for row in range(len(counts)) if counts[row]}
    begins = sorted(starts | set(begins_T.nonzero().squeeze(1).tolist()))
    lengths = tuple(stop - start for start, stop in zip(begins, [*begins[1:], len(positions_T)], strict=True))
    if not torch.equal(positions_T, torch.cat([torch.arange(length) for length in lengths])):
        raise ConfigError(
            "position_ids must count 0, 1, 2, ... in each sequence: a split model sends lengths, not positions."
        )
    return Cells(mask_BS, lengths)


def pieces_of(lengths: tuple[int, ...], most_tokens: int, most_sequences: int) -> list[tuple[int, ...]]:
    """Groups of consecutive sequences that fit into one message each; a sequence that is longer is alone.

    >>> pieces_of((3, 3, 3, 9, 1), 6, 4)
    [(3, 3), (3,), (9,), (1,)]
    """
    pieces: list[tuple[int, ...]] = []
    for length in lengths:
        if pieces and len(pieces[-1]) < most_sequences and sum(pieces[-1]) + length <= most_tokens:
            pieces[-1] += (length,)
        else:
            pieces.append((length,))
    return pieces
