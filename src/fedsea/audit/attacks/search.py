"""The search that the forward attacks share: from the first position to the last, whatever fits what was seen best.

The attacker runs candidates for a position through the client's own blocks (the public weights) behind the prefix that
it has recovered so far. With noise it weighs how likely the noise is to make this difference against what the public
model expects next, and keeps several hypotheses.

S  sequences, B  hypotheses of each, C  candidates, T  tokens of the longest, V  vocabulary size, H  hidden size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.targets import Observation, Progress, Recovered, Target, unheard
from fedsea.model.branching import Branches
from fedsea.types import Channel

_HINTS = 48
"""Candidates that are tried first where what was seen is exact: so many that the public model expects, and so many
whose rows alone are near."""
_CLEAR = 1e-3
"""A squared distance below this share of the row's own, and of the runner-up's, ends the search of a position."""
_ANYTHING = 0.05
"""Share of the prior that is spread evenly over the vocabulary."""
_FOLLOWERS = 48
"""Candidates of each hypothesis but the leading one, whose whole vocabulary is searched."""
_OWN = 24
"""Further candidates of each of those: what the public model expects behind it."""
_EXHAUSTIVE = 20_000
"""Largest vocabulary that is searched whole; of a larger one a shortlist is, and the shortlist's recall is told."""
_SHORTLIST = 1024


@dataclass(frozen=True)
class Seen:
    """What is known of one sequence.

    Attributes:
        rows_TH: Hidden states as observed.
        variance_T: Of their difference from the client's own.
        evidence_TV: Further log-likelihood of each position's token (of the backward channel, say).
        metric_HH: Differences are multiplied by it before they are measured; the same for all sequences of a search.
        row_bound: Norm to which the client scaled every row by itself, and so candidates are; 0: it did not.
    """

    rows_TH: torch.Tensor
    variance_T: torch.Tensor
    evidence_TV: torch.Tensor | None = None
    metric_HH: torch.Tensor | None = None
    row_bound: float = 0.0


def seen_once(attacker: Attacker, target: Target) -> Seen:
    """The first pass over a target."""
    return seen_in(attacker, target.observations[0])


def seen_in(attacker: Attacker, observation: Observation) -> Seen:
    """One pass."""
    rows_TH = observation.hidden_TH.float()
    return unclipped(attacker, rows_TH, attacker.row_variance(Channel.HIDDEN, rows_TH), observation.most_rows)


def unclipped(attacker: Attacker, rows_TH: torch.Tensor, variance_T: torch.Tensor, most_rows: int = 0) -> Seen:
    """Rows as they were before the plan's clip, as far as that can be told, and the noise as it is then.

    Where every row was clipped by itself they stay as they are, and candidates are clipped likewise.
    """
    if bound := attacker.row_bound(most_rows):
        return Seen(rows_TH, variance_T, row_bound=bound)
    factor = attacker.shrunk(len(rows_TH))
    return Seen(rows_TH / factor, variance_T / factor**2)


def search(
    attacker: Attacker,
    seen: Sequence[Seen],
    truths: Sequence[torch.Tensor],
    *,
    beam: int = 1,
    prior: bool = False,
    progress: Progress = unheard,
) -> list[Recovered]:
    """Recover sequences.

    Args:
        attacker: Who searches.
        seen: One for each sequence.
        truths: For measuring a shortlist's recall, and for nothing else.
        beam: B.
        prior: Weigh the public model's expectation; without it the nearest candidate wins.
        progress: Told of positions.
    """
    beam = min(beam, attacker.vocab_size)
    order = sorted(range(len(seen)), key=lambda i: -len(seen[i].rows_TH))
    together = max(1, min(len(order), 64 // beam))
    total = sum(len(item.rows_TH) for item in seen)
    found: dict[int, Recovered] = {}
    done = 0
    for start in range(0, len(order), together):
        group = order[start : start + together]
        run = _Group(attacker, [seen[i] for i in group], [truths[i] for i in group], beam, prior)
        while run.active:
            done += run.step()
            progress(done, total)
        found |= dict(zip(group, run.answers(), strict=True))
    return [found[i] for i in range(len(seen))]


def _clipped(rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Rows [..., H] as the client scales each by itself; as they are where the bound is infinite."""
    if bool(torch.isinf(bounds).all()):
        return rows
    scaled: torch.Tensor = rows * (bounds / rows.norm(dim=-1, keepdim=True)).clamp_max(1.0)
    return scaled


class _Group:
    """Sequences that are searched in lockstep, longest first."""

    def __init__(
        self, attacker: Attacker, seen: Sequence[Seen], truths: Sequence[torch.Tensor], beam: int, prior: bool
    ) -> None:
        self._attacker = attacker
        self._device = attacker.base.device
        self._seen, self._truths = seen, truths
        self._beam, self._prior = beam, prior
        self._exact = beam == 1 and not prior
        self._branches: Branches = attacker.branches(len(seen) * beam)
        self._reader = attacker.reader(len(seen) * beam)
        size = attacker.vocab_size
        self._expected_RV = torch.full((len(seen) * beam, size), -float(torch.log(torch.tensor(float(size)))))
        self._expected_RV = self._expected_RV.to(self._device)
        self._scores_SB = torch.full((len(seen), beam), -torch.inf, device=self._device)
        self._scores_SB[:, 0] = 0.0
        self._ids_SBt = torch.zeros(len(seen), beam, 0, dtype=torch.long, device=self._device)
        self._table_VH: torch.Tensor | None = None
        metric_HH = seen[0].metric_HH
        self._metric_HH = None if metric_HH is None else metric_HH.to(self._device)
        self._bounds_S = torch.tensor([item.row_bound or torch.inf for item in seen], device=self._device)
        self._answers: dict[int, torch.Tensor] = {}
        self._position = 0
        self._considered = self._positions = 0
        self.active = len(seen)

    def answers(self) -> list[Recovered]:
        """When no sequence is active any more."""
        recall = self._considered / max(1, self._positions)
        note = "" if self._whole else f"shortlist recall {recall:.4f}"
        return [Recovered(self._answers[i], note=note, shortlist_recall=recall) for i in range(len(self._seen))]

    @property
    def _whole(self) -> bool:
        return self._attacker.vocab_size <= _EXHAUSTIVE

    def step(self) -> int:
        """One position of all active sequences; how many these are."""
        now, position = self.active, self._position
        rows_SH = torch.stack([self._seen[i].rows_TH[position] for i in range(now)]).to(self._device)
        variance_S = torch.stack([self._seen[i].variance_T[position] for i in range(now)]).to(self._device)
        floor_S = rows_SH.square().mean(dim=1) * 1e-8
        variance_S = torch.maximum(variance_S, floor_S)
        evidence_SV = self._evidence(now)
        if self._exact:
            ids_S = self._nearest(rows_SH, evidence_SV)
            parents_R = torch.arange(now, device=self._device)
            self._ids_SBt = torch.cat([self._ids_SBt, ids_S[:, None, None]], dim=2)
        else:
            parents_R, ids_S = self._best(rows_SH, variance_S, evidence_SV)
        self._advance(parents_R, ids_S.flatten())
        return now

    def _evidence(self, now: int) -> torch.Tensor | None:
        if self._seen[0].evidence_TV is None:
            return None
        rows = [self._seen[i].evidence_TV[self._position] for i in range(now)]  # type: ignore[index]
        return torch.stack(rows).to(self._device)

    # --- the nearest candidate --------------------------------------------------------------------------------------

    def _nearest(self, rows_SH: torch.Tensor, evidence_SV: torch.Tensor | None) -> torch.Tensor:
        """Ids [S] of the candidates nearest to what was seen."""
        hints_SC = self._suggested(rows_SH, self._expected_RV, min(_HINTS, self._attacker.vocab_size))
        distances_SC = self._distances(rows_SH, hints_SC)
        best_S, order_S = distances_SC.min(dim=1)
        ids_S = hints_SC.gather(1, order_S[:, None])[:, 0]
        others_SC = distances_SC.masked_fill(hints_SC == ids_S[:, None], torch.inf)
        clear_S = best_S <= _CLEAR * torch.minimum(others_SC.amin(dim=1), rows_SH.square().sum(dim=1))
        if evidence_SV is None and bool(clear_S.all()):
            self._count(None)
            return ids_S
        open_O = (~clear_S).nonzero().squeeze(1)
        candidates_OC = self._candidates(rows_SH, open_O)
        distances_OC = self._distances(rows_SH.index_select(0, open_O), candidates_OC, open_O)
        ids_S = ids_S.clone()
        ids_S[open_O] = candidates_OC.gather(1, distances_OC.argmin(dim=1, keepdim=True))[:, 0]
        self._count(open_O, candidates_OC)
        return ids_S

    def _candidates(self, rows_SH: torch.Tensor, which_O: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """Candidates [O, C] of some hypotheses: the vocabulary, or what the public model and the row alone suggest."""
        size = self._attacker.vocab_size
        if self._whole:
            return torch.arange(size, device=self._device).expand(len(which_O), size)
        expected_OV = self._expected_RV.index_select(0, which_O * stride)
        return self._suggested(rows_SH.index_select(0, which_O), expected_OV, _SHORTLIST // 2)

    def _suggested(self, rows_OH: torch.Tensor, expected_OV: torch.Tensor, count: int) -> torch.Tensor:
        """Candidates [O, 2 count] of the public model, and of the rows alone; some may be the same."""
        bound = self._bounds_S.amin()  # near enough to choose by
        near_OV = -torch.cdist(rows_OH, _clipped(self._alone(), bound))
        return torch.cat([values_OV.topk(count).indices for values_OV in (expected_OV, near_OV)], dim=1)

    def _alone(self) -> torch.Tensor:
        """Hidden states [V, H] of every token behind the beginning alone: where its rows are, roughly."""
        if self._table_VH is None:
            branches = self._attacker.branches(1)
            for token in self._attacker.beginning:
                branches.take(torch.tensor([token], device=self._device))
            ids = torch.arange(self._attacker.vocab_size, device=self._device)
            parts = [branches.peek(part[None])[0] for part in torch.split(ids, self._attacker.most_rows)]
            self._table_VH = torch.cat(parts).float()
        return self._table_VH

    def _distances(
        self, rows_OH: torch.Tensor, candidates_OC: torch.Tensor, which_O: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Squared distances [O, C] of candidates from what was seen, a batch at a time."""
        parts = []
        width = max(1, self._attacker.most_rows // max(1, len(rows_OH)))
        bounds_O = self._bounds_S[: len(rows_OH)] if which_O is None else self._bounds_S[which_O // self._beam]
        for part_OC in torch.split(candidates_OC, width, dim=1):
            hidden_OCH = _clipped(self._branches.peek(part_OC, which_O).float(), bounds_O[:, None, None])
            differences_OCH = hidden_OCH - rows_OH[:, None]
            if self._metric_HH is not None:
                differences_OCH = differences_OCH @ self._metric_HH
            parts.append(differences_OCH.square().sum(dim=-1))
        return torch.cat(parts, dim=1)

    # --- the most likely hypotheses ---------------------------------------------------------------------------------

    def _best(
        self, rows_SH: torch.Tensor, variance_S: torch.Tensor, evidence_SV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Parents [S * B] and next ids [S, B] of the most likely hypotheses."""
        now, beam = self.active, self._beam
        leaders_S = torch.arange(now, device=self._device) * beam
        candidates_SC = self._candidates(rows_SH, torch.arange(now, device=self._device), beam)
        likelihood_SC = -self._distances(rows_SH, candidates_SC, leaders_S) / (2 * variance_S[:, None])
        if evidence_SV is not None:
            likelihood_SC = likelihood_SC + evidence_SV.gather(1, candidates_SC)
        expected_SBV = self._expected_RV.view(now, beam, -1)
        local_SC = likelihood_SC + expected_SBV[:, 0].gather(1, candidates_SC)
        # Over the whole vocabulary: a shortlist may name a token twice, which would be two hypotheses.
        local_SV = torch.full_like(expected_SBV[:, 0], -torch.inf).scatter(1, candidates_SC, local_SC)
        scores = [self._scores_SB[:, :1] + local_SV]
        ids = [torch.arange(local_SV.shape[1], device=self._device).expand_as(local_SV)]
        parents = [torch.zeros_like(ids[0])]
        if beam > 1 and self._position:
            liked_SF = local_SV.topk(min(_FOLLOWERS, candidates_SC.shape[1])).indices
            further = self._follow(liked_SF, rows_SH, variance_S, evidence_SV)
            for found, more in zip((scores, ids, parents), further, strict=True):
                found.append(more)
        scores_SX, ids_SX, parents_SX = (torch.cat(parts, dim=1) for parts in (scores, ids, parents))
        self._scores_SB, order_SB = scores_SX.topk(beam)
        ids_SB, parents_SB = ids_SX.gather(1, order_SB), parents_SX.gather(1, order_SB)
        self._count(torch.arange(now, device=self._device), candidates_SC)
        past_SBt = self._ids_SBt.gather(1, parents_SB[:, :, None].expand(-1, -1, self._position))
        self._ids_SBt = torch.cat([past_SBt, ids_SB[:, :, None]], dim=2)
        return (leaders_S[:, None] + parents_SB).flatten(), ids_SB

    def _follow(
        self,
        liked_SF: torch.Tensor,
        rows_SH: torch.Tensor,
        variance_S: torch.Tensor,
        evidence_SV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, ids and parents [S, (B - 1) F] of all hypotheses but the leading one.

        Their candidates are those that the leading one found likely, and those that the public model expects behind
        each of them: where the leading one is wrong, it likes the wrong ones.
        """
        now, others = self.active, self._beam - 1
        which_O = torch.arange(now * self._beam, device=self._device).view(now, -1)[:, 1:].flatten()

        def each(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(others, dim=0)

        expected_OV = self._expected_RV.index_select(0, which_O)
        liked_OF = each(liked_SF)
        own = min(_OWN, expected_OV.shape[1] - liked_OF.shape[1])
        own_OF = expected_OV.scatter(1, liked_OF, -torch.inf).topk(own).indices
        ids_OF = torch.cat([liked_OF, own_OF], dim=1)
        scores_OF = -self._distances(each(rows_SH), ids_OF, which_O) / (2 * each(variance_S)[:, None])
        if evidence_SV is not None:
            scores_OF = scores_OF + each(evidence_SV).gather(1, ids_OF)
        scores_OF = self._scores_SB[:, 1:].reshape(-1, 1) + scores_OF + expected_OV.gather(1, ids_OF)
        parents_OF = torch.arange(1, self._beam, device=self._device).repeat(now)[:, None].expand_as(ids_OF)
        return scores_OF.view(now, -1), ids_OF.view(now, -1), parents_OF.reshape(now, -1)

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _count(self, open_O: torch.Tensor | None, candidates: torch.Tensor | None = None) -> None:
        """How often the truth was among the candidates."""
        self._positions += self.active
        self._considered += self.active
        if self._whole or open_O is None or candidates is None:
            return
        for number, i in enumerate(open_O.tolist()):
            self._considered -= int(not bool((candidates[number] == self._truths[i][self._position]).any()))

    def _advance(self, parents_R: torch.Tensor, ids_R: torch.Tensor) -> None:
        """Go on with the hypotheses that won, without the sequences that have ended."""
        self._position += 1
        ended = [i for i in range(self.active) if len(self._seen[i].rows_TH) == self._position]
        for i in ended:
            self._answers[i] = self._ids_SBt[i, 0].cpu()
        self.active -= len(ended)
        rows = self.active * self._beam
        self._scores_SB, self._ids_SBt = self._scores_SB[: self.active], self._ids_SBt[: self.active]
        if not self.active:
            return
        parents_R, ids_R = parents_R[:rows], ids_R[:rows]
        if len(parents_R) != self._branches.num or bool((parents_R != torch.arange(rows, device=self._device)).any()):
            self._branches.select(parents_R)
            self._reader.select(parents_R)
        self._branches.take(ids_R)
        # A few per cent of anything at all: what people write (names, numbers) the public model may never have seen.
        expected_RV = self._reader.take(ids_R)
        anything = math.log(_ANYTHING / expected_RV.shape[1])
        self._expected_RV = torch.logaddexp(
            expected_RV + math.log1p(-_ANYTHING), torch.full_like(expected_RV, anything)
        )
