"""Many possible next tokens of a sequence at once: what a search over the vocabulary runs.

All hypotheses of a `Branches` have the same length. Candidates for the next position share their hypothesis' keys
and values, and each sees itself besides; nothing is kept of them until one is taken.

S  hypotheses, C  candidates of each, t  tokens so far, N  key/value heads, G  query heads of each, D  head size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from fedsea.model.segment import Segment


class Attends(Protocol):
    """What takes the place of a family's attention."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Rows [S, C, heads, D]."""
        ...


BRANCHING: ContextVar[Attends | None] = ContextVar("fedsea_branching", default=None)
"""Whose candidates the blocks of this context run on; None outside."""


class Branches:
    """Hypotheses of one length, run through one segment.

    Args:
        segment: Any segment; input blocks take ids, the others hidden states.
        num: S.
    """

    def __init__(self, segment: Segment, num: int) -> None:
        self._segment = segment
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._history: torch.Tensor | None = None
        self._keeping = False
        self._rows: torch.Tensor | None = None
        self._direct = segment.branches
        self.num = num
        self.length = 0

    @torch.inference_mode()
    def peek(self, entering: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [S, C, H] that the next position would have.

        Args:
            entering: Ids [S, C] for input blocks, hidden states [S, C, H] for the others.
            rows: Hypotheses that these are candidates of; None: all, in order.
        """
        self._rows = rows
        try:
            return self._run(entering)
        finally:
            self._rows = None

    @torch.inference_mode()
    def take(self, entering: torch.Tensor) -> torch.Tensor:
        """Lengthen every hypothesis by one token.

        Args:
            entering: Ids [S], or hidden states [S, H].

        Returns:
            Hidden states [S, H].
        """
        one = entering[:, None]
        self._keeping, self._new = True, {}
        try:
            out_S1H = self._run(one)
        finally:
            self._keeping = False
        for block, pair in self._new.items():
            before = self._kept.get(block)
            joined = pair if before is None else tuple(torch.cat(p, dim=2) for p in zip(before, pair, strict=True))
            self._kept[block] = joined[0], joined[1]
        if not self._direct:
            self._history = one if self._history is None else torch.cat([self._history, one], dim=1)
        self.length += 1
        return out_S1H[:, 0]

    def select(self, rows_S: torch.Tensor) -> None:
        """Go on with these hypotheses; one may stand there several times."""
        self._kept = {
            block: (keys.index_select(0, rows_S), values.index_select(0, rows_S))
            for block, (keys, values) in self._kept.items()
        }
        if self._history is not None:
            self._history = self._history.index_select(0, rows_S)
        self.num = len(rows_S)

    def _run(self, entering: torch.Tensor) -> torch.Tensor:
        if not self._direct:
            return self._run_whole(entering)
        with self._attending():
            positions = torch.full((1, entering.shape[1]), self.length, device=entering.device)
            return self._segment.run_branches(entering, positions)

    def _run_whole(self, entering: torch.Tensor) -> torch.Tensor:
        """Every candidate with its whole past, for families whose attention cannot be replaced."""
        num, width = entering.shape[:2]
        rows = entering[:, :, None]
        if self._history is not None:
            history = self._history if self._rows is None else self._history.index_select(0, self._rows)
            past = history[:, None].expand(num, width, *history.shape[1:])
            rows = torch.cat([past, rows], dim=2)
        length = rows.shape[2]
        out_TH = self._segment(rows.flatten(0, 2), [length] * (num * width))  # type: ignore[operator]
        last: torch.Tensor = out_TH.view(num, width, length, -1)[:, :, -1]
        return last

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        token = BRANCHING.set(self)
        try:
            yield
        finally:
            BRANCHING.reset(token)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Every candidate over its hypothesis' past and itself: [S, C, heads, D] of [S, heads, C, D]."""
        block: int = module.layer_idx  # type: ignore[assignment]
        if self._keeping:
            self._new[block] = key, value
        num, heads, width, size = query.shape
        groups = heads // key.shape[1]
        scaling = kwargs.get("scaling") or size**-0.5
        query_SNGCD = (query * scaling).view(num, key.shape[1], groups, width, size)
        own_SNGC = torch.einsum("sngcd,sncd->sngc", query_SNGCD, key)
        past = self._past(block, kwargs.get("sliding_window"))
        if past is None:
            out_SNGCD = value[:, :, None].expand_as(query_SNGCD)
        else:
            keys_SNtD, values_SNtD = past
            scores = query_SNGCD.flatten(2, 3) @ keys_SNtD.transpose(2, 3)
            scores = torch.cat([scores.view(*own_SNGC.shape, -1), own_SNGC[..., None]], dim=-1)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            mixed = weights[..., :-1].flatten(2, 3) @ values_SNtD
            out_SNGCD = mixed.view_as(query_SNGCD) + weights[..., -1:] * value[:, :, None]
        return out_SNGCD.permute(0, 3, 1, 2, 4).reshape(num, width, heads, size)

    def _past(self, block: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        if block not in self._kept or window == 1:
            return None
        keys, values = self._kept[block]
        if self._rows is not None:
            keys, values = keys.index_select(0, self._rows), values.index_select(0, self._rows)
        return (keys, values) if window is None else (keys[:, :, 1 - window :], values[:, :, 1 - window :])
