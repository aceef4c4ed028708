"""Labels from the gradient at the trunk's output: the mathematics of attack A5, on plain tensors.

The loss is a sum of cross entropies, so with final hidden states `out` and the head's Jacobian W the gradient at the
trunk's output is J^T W^T (p - onehot(label)): linear in the labels, and everything but the labels is known to a
server that has the public output blocks and its own outputs. Attention is causal, so a row's gradient owes something
to its own label and to later ones only. From the last row to the first, every label in the vocabulary is compared
with the row's gradient; what the label found contributes to earlier rows is subtracted from them.

    T  rows of all sequences end to end, B  sequences under attack at once, H  hidden size, V  vocabulary size
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsea.model.rowwise import own_jacobians
from fedsea.model.segments import OutputBlocks

NO_LABEL = -1
"""Stands for a row that carries no loss."""

_ROUNDING = 1e-6
"""Standard deviation that rounding leaves in a value of a gradient, relative to the largest row's."""

_NO_LABEL_PRIOR = 0.5
_CHUNK_VALUES = 1 << 24
_JACOBIAN_VALUES = 1 << 27
"""Of rows' Jacobians that are held at once, H * H a row."""

_EXACT = 8
"""Labels of a row whose distance is computed once more, term by term: the expanded square cancels at 1e-7."""


@dataclass(frozen=True, slots=True)
class DecodedLabels:
    """What the gradient of one micro-batch says.

    Attributes:
        labels_T: The most likely label of each row; `NO_LABEL` where the gradient shows none.
        likelihood_TV: Logarithm of the gradient's likelihood under each label, to a constant for each row; where rows
            before the last depend on labels after them, these are taken as decoded. Not the prior.
        prior_TV: Log-probability of each label by the public output blocks, on the server's own outputs.
        residual_std: What the labels leave unexplained, a value's standard deviation.
    """

    labels_T: torch.Tensor
    likelihood_TV: torch.Tensor
    prior_TV: torch.Tensor
    residual_std: float


@dataclass(frozen=True, slots=True)
class _Head:
    """The head's derivatives at the rows: the gradient of a logit v is `slope_TV[t, v] * weight_VH[v]`."""

    weight_VH: torch.Tensor
    slope_TV: torch.Tensor | None
    log_p_TV: torch.Tensor

    def pull(self, rows: torch.Tensor, q_BV: torch.Tensor) -> torch.Tensor:
        """Gradient [B, H] at the final hidden states, of logits weighted by `q_BV`."""
        return (q_BV if self.slope_TV is None else q_BV * self.slope_TV[rows]) @ self.weight_VH


def _head(output_blocks: OutputBlocks, out_TH: torch.Tensor) -> _Head:
    """Derivatives of any head that is linear, with a bias, a factor or a soft cap on its logits."""
    width = out_TH.shape[1]
    with torch.no_grad():
        logits_TV = output_blocks.logits(out_TH).float()
        cap = getattr(output_blocks.model.config, "final_logit_softcapping", None)
        small = 1.0 if cap is None else 1e-3  # a soft cap is linear near zero
        probe_TH = torch.cat([torch.zeros(1, width), small * torch.eye(width)]).to(out_TH)
        answer_TV = output_blocks.logits(probe_TH).float()
        weight_VH = ((answer_TV[1:] - answer_TV[0]) / small).T.contiguous()
        slope_TV = None if cap is None else 1.0 - (logits_TV / cap) ** 2
    return _Head(weight_VH, slope_TV, logits_TV.log_softmax(-1))


class _Jacobians:
    """Each row's own Jacobian, worked out for as many rows at once as memory allows.

    Args:
        output_blocks: The public ones.
        output_TH: Where they are taken.
        lengths: Tokens of each sequence.
    """

    def __init__(self, output_blocks: OutputBlocks, output_TH: torch.Tensor, lengths: Sequence[int]) -> None:
        self._blocks = output_blocks
        self._sequences = torch.split(output_TH, list(lengths))
        self._starts = [sum(lengths[:number]) for number in range(len(lengths))]
        self.at_once = max(1, _JACOBIAN_VALUES // output_TH.shape[1] ** 2)
        self._held: dict[int, tuple[int, torch.Tensor]] = {}

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, H, H] of some rows, best asked for from last to first."""
        return torch.stack([self._one(row) for row in rows.tolist()])

    def _one(self, row: int) -> torch.Tensor:
        number = bisect.bisect_right(self._starts, row) - 1
        place = row - self._starts[number]
        first, held_RHH = self._held.get(number, (0, None))
        if held_RHH is None or not first <= place < first + len(held_RHH):
            first = max(0, place + 1 - max(1, self.at_once // len(self._sequences)))
            held_RHH = own_jacobians(self._blocks, self._sequences[number][: place + 1], first)
            self._held[number] = first, held_RHH
        return held_RHH[place - first]


@dataclass(slots=True)
class _Rows:
    """Working state of one pass over the rows."""

    head: _Head
    jacobians: _Jacobians
    residual_TH: torch.Tensor
    deviation_T: torch.Tensor
    may_be_none: bool
    likelihood_TV: torch.Tensor
    labels_T: torch.Tensor
    expected_TV: torch.Tensor
    leftover_T: torch.Tensor

    def decode(self, rows: torch.Tensor) -> None:
        """Compare every label with the gradient of some rows, of which no later row's label is unknown."""
        head, pull_BHH = self.head, self.jacobians(rows)
        p_BV = head.log_p_TV[rows].exp()
        seen_BH = self.residual_TH[rows]
        # seen = pull (W^T D p - D_v W_v), so what is left for label v is  base + D_v pull W_v.
        base_BH = seen_BH - (pull_BHH @ head.pull(rows, p_BV)[..., None]).squeeze(-1)
        cross_BV = (base_BH[:, None] @ pull_BHH).squeeze(1) @ head.weight_VH.T
        square_BV = _squared_norms(head.weight_VH, pull_BHH)
        if head.slope_TV is not None:
            cross_BV, square_BV = cross_BV * head.slope_TV[rows], square_BV * head.slope_TV[rows] ** 2
        distance_BV = (base_BH.square().sum(-1, keepdim=True) + 2 * cross_BV + square_BV).clamp_min(0)
        self._refine(rows, distance_BV, base_BH, pull_BHH)
        weight_B1 = 0.5 / self.deviation_T[rows, None].square()
        likelihood_BV = -distance_BV * weight_B1
        posterior_BV = likelihood_BV + head.log_p_TV[rows]
        none_B1 = -seen_BH.square().sum(-1, keepdim=True) * weight_B1
        scores = torch.cat([posterior_BV, none_B1 if self.may_be_none else torch.full_like(none_B1, -torch.inf)], 1)
        if self.may_be_none:
            scores[:, -1:] += math.log(_NO_LABEL_PRIOR)
        best_B = scores.argmax(-1)
        is_none_B = best_B == posterior_BV.shape[1]
        self.labels_T[rows] = torch.where(is_none_B, NO_LABEL, best_B)
        self.likelihood_TV[rows] = likelihood_BV
        share_BV = scores.softmax(-1)[:, :-1]
        # On average, what these rows contribute: p where there is a label at all, minus each label by its share.
        self.expected_TV[rows] = p_BV * share_BV.sum(-1, keepdim=True) - share_BV
        found_B = distance_BV.gather(1, best_B.clamp_max(posterior_BV.shape[1] - 1)[:, None]).squeeze(1)
        self.leftover_T[rows] = torch.where(is_none_B, seen_BH.square().sum(-1), found_B)

    def _refine(
        self, rows: torch.Tensor, distance_BV: torch.Tensor, base_BH: torch.Tensor, pull_BHH: torch.Tensor
    ) -> None:
        head = self.head
        nearest_BE = distance_BV.topk(min(_EXACT, distance_BV.shape[1]), largest=False).indices
        label_BEH = head.weight_VH[nearest_BE]
        if head.slope_TV is not None:
            label_BEH = label_BEH * head.slope_TV[rows].gather(1, nearest_BE)[..., None]
        left_BEH = base_BH[:, None] + label_BEH @ pull_BHH.transpose(1, 2)
        distance_BV.scatter_(1, nearest_BE, left_BEH.square().sum(-1))


def _squared_norms(weight_VH: torch.Tensor, pull_BHH: torch.Tensor) -> torch.Tensor:
    at_once = max(1, _CHUNK_VALUES // weight_VH.numel())
    return torch.cat([(weight_VH @ part.transpose(1, 2)).square().sum(-1) for part in torch.split(pull_BHH, at_once)])


def decode_labels(
    output_blocks: OutputBlocks,
    output_TH: torch.Tensor,
    gradient_TH: torch.Tensor,
    lengths: Sequence[int],
    *,
    noise_std_T: torch.Tensor | None = None,
    every_row: bool = True,
) -> DecodedLabels:
    """Labels of a micro-batch from the gradient of its summed loss.

    Args:
        output_blocks: The public ones; the client's adapters are unknown, and count as noise that is estimated.
        output_TH: The server's own trunk outputs, as it sent them.
        gradient_TH: What the client sent for them.
        lengths: Tokens of each sequence; its last row never carries a label.
        noise_std_T: Of the noise that is known to be on each row of the gradient, codec included; None: none.
        every_row: The loss is taken at every row but each sequence's last; else a row may carry none.

    Returns:
        Labels, which are the text shifted by one, and how likely each was.
    """
    gradient_TH = gradient_TH.float()
    device = gradient_TH.device
    ends_B = torch.tensor(lengths, device=device).cumsum(0)
    largest = float(gradient_TH.norm(dim=1).max()) / gradient_TH.shape[1] ** 0.5
    floor = max(_ROUNDING * largest, 1e-12)
    known_T = torch.zeros(len(gradient_TH), device=device) if noise_std_T is None else noise_std_T.float()
    deviation_T = known_T.clamp_min(floor)
    leaf_TH = output_TH.detach().float().requires_grad_()
    with torch.enable_grad():
        out_TH = output_blocks.final(leaf_TH, lengths)
    head = _head(output_blocks, out_TH.detach())
    jacobians = _Jacobians(output_blocks, leaf_TH.detach(), lengths)
    graph = (leaf_TH, out_TH) if len(output_blocks.blocks) else None
    decoded = _pass(head, jacobians, gradient_TH, graph, ends_B, lengths, deviation_T, every_row)
    if decoded.residual_std > 2 * float(deviation_T.median()):
        # The client's output blocks are not the public ones any more: what they change is noise to us.
        deviation_T = deviation_T.clamp_min(decoded.residual_std)
        decoded = _pass(head, jacobians, gradient_TH, graph, ends_B, lengths, deviation_T, every_row)
    return decoded


def _pass(
    head: _Head,
    jacobians: _Jacobians,
    gradient_TH: torch.Tensor,
    graph: tuple[torch.Tensor, torch.Tensor] | None,
    ends_B: torch.Tensor,
    lengths: Sequence[int],
    deviation_T: torch.Tensor,
    every_row: bool,
) -> DecodedLabels:
    shape, device = head.log_p_TV.shape, gradient_TH.device
    state = _Rows(
        head,
        jacobians,
        gradient_TH.clone(),
        deviation_T,
        not every_row,
        torch.zeros(shape, device=device),
        torch.full(shape[:1], NO_LABEL, device=device),
        torch.zeros(shape, device=device),
        torch.zeros(shape[:1], device=device),
    )
    carrying_T = torch.ones(shape[0], dtype=torch.bool, device=device)
    carrying_T[ends_B - 1] = False
    if graph is None:  # without blocks no row owes anything to another one
        for rows in torch.split(carrying_T.nonzero().squeeze(1), min(1024, jacobians.at_once)):
            state.decode(rows)
    else:
        _last_to_first(state, graph, ends_B, lengths)
    width = gradient_TH.shape[1]
    left = state.leftover_T[carrying_T]
    residual_std = float((left.median() / width).sqrt()) if left.numel() else 0.0
    return DecodedLabels(state.labels_T.cpu(), state.likelihood_TV.cpu(), head.log_p_TV.cpu(), residual_std)


def _last_to_first(
    state: _Rows, graph: tuple[torch.Tensor, torch.Tensor], ends_B: torch.Tensor, lengths: Sequence[int]
) -> None:
    leaf_TH, out_TH = graph
    lengths_B = torch.tensor(lengths, device=ends_B.device)
    for back in range(2, max(lengths) + 1):
        rows = (ends_B - back)[lengths_B >= back]
        state.decode(rows)
        cotangent_TH = torch.zeros_like(out_TH)
        cotangent_TH[rows] = state.head.pull(rows, state.expected_TV[rows])
        (explained_TH,) = torch.autograd.grad(out_TH, leaf_TH, cotangent_TH, retain_graph=True)
        state.residual_TH -= explained_TH
