"""From final hidden states to logits at their cells, and to the loss as transformers takes it.

B  rows of a padded batch, S  its columns, K  columns whose logits are wanted, T  tokens end to end, V  vocabulary size
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fedsea.client.padding import Cells, spread
from fedsea.model.segments import OutputBlocks
from fedsea.types import IGNORE


def kept_logits(
    head: OutputBlocks, final_TH: torch.Tensor, cells: Cells, logits_to_keep: int | torch.Tensor
) -> torch.Tensor:
    """Logits [B, K, V]; the head runs on the tokens of the wanted columns alone.

    Args:
        head: Whose head.
        final_TH: Final hidden states of all tokens.
        cells: Where they are.
        logits_to_keep: So many last columns, or these columns; 0: all.
    """
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return cells.spread(head.logits(final_TH))
    columns: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu()
    wanted_BS = torch.zeros_like(cells.mask_BS)
    wanted_BS[:, columns] = True
    rows_T = wanted_BS[cells.mask_BS]
    logits_RV = head.logits(final_TH[rows_T.to(final_TH.device)])
    if isinstance(logits_to_keep, int):
        return spread(logits_RV, cells.mask_BS[:, columns])
    return spread(logits_RV, wanted_BS & cells.mask_BS)[:, columns]


def targets_of(labels_BS: torch.Tensor | None, shift_labels_BS: torch.Tensor | None) -> torch.Tensor | None:
    """The next token of each cell, from labels as transformers has them."""
    if shift_labels_BS is not None or labels_BS is None:
        return shift_labels_BS
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORE)


def loss_of(
    logits_BSV: torch.Tensor, cells: Cells, targets_BS: torch.Tensor, num_items: int | torch.Tensor | None
) -> torch.Tensor:
    """Cross entropy in float32, as transformers' causal models take it; padding takes none.

    Args:
        logits_BSV: Of all columns.
        cells: Where the tokens are.
        targets_BS: See `targets_of`.
        num_items: What the sum is divided by; None: the number of targets.
    """
    device = logits_BSV.device
    logits_TV = logits_BSV[cells.mask_BS.to(device)].float()
    targets_T = cells.pack(targets_BS).to(device)
    if num_items is None:
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE)
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    return total / (num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items)
