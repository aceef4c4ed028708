"""What an update told, as figures: how many of its tokens were named, and how many of them anybody would have named.

U  updates, D  draws of the bootstrap, C  commonest tokens, K  what is counted of an update
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsea.audit.attacks.update_inversion import NOTHING, SpanFindings

_EXPOSED_EXCESS = 0.5
_CLEAR_EXCESS = 0.05
CERTAIN_UPDATES = 6
"""With fewer, all of them may be above the guess by luck, and so the interval's low end: then the margin counts too."""
_DRAWS = 500
_TAIL = 0.025


@dataclass(frozen=True, slots=True)
class UpdateInversion:
    """What one kind of update told.

    Attributes:
        kind: "gradient" (`sync = "step"`) or "difference" (`sync = "round"`).
        clients: How many clients' updates were summed before the server saw them.
        sequences: Texts of the update, each client's.
        steps: Optimizer steps that the update covers.
        num_tokens: Distinct tokens behind it, over all updates that were attacked.
        recall: Share of them that was named.
        precision: Share of the tokens named that were there.
        guess: Recall of naming as many of the commonest tokens of public text.
        quality: F1 of what was named: naming much that was not there counts against the attack.
        guess_quality: The best F1 of naming so many of the commonest tokens of public text, however many these are.
        side: "input" or "output": of which segment.
        updates: How many were attacked.
        excess_share_low: Low end of the 95 % interval of `excess_share`, bootstrapped over the updates.
        conclusive: Share of the updates of which the attacker knows that its answer is exact.
        method: See `SpanFindings`; the commonest.
    """

    kind: str
    clients: int
    sequences: int
    steps: int
    num_tokens: int
    recall: float
    precision: float
    guess: float
    conclusive: float
    method: str
    quality: float
    guess_quality: float
    side: str = "input"
    updates: int = 0
    excess_share_low: float = 0.0

    @property
    def excess_share(self) -> float:
        """How much better than guessing, as a share of what the guess leaves open; negative if it was worse."""
        return (self.quality - self.guess_quality) / max(1.0 - self.guess_quality, 1e-9)

    @property
    def exposed(self) -> bool:
        """Whether it told more than half of what the guess leaves open."""
        return self.excess_share > _EXPOSED_EXCESS

    @property
    def certain(self) -> bool:
        """Whether it was better than guessing, and not by chance."""
        clear = self.updates >= CERTAIN_UPDATES or self.excess_share > _CLEAR_EXCESS
        return clear and self.excess_share_low > 0


@dataclass(frozen=True, slots=True)
class Case:
    """See the fields of `UpdateInversion`."""

    kind: str
    clients: int
    sequences: int
    steps: int
    side: str


def scored(
    case: Case, found: Sequence[SpanFindings], texts: Sequence[Sequence[torch.Tensor]], common: Sequence[int]
) -> UpdateInversion:
    """Score what was named.

    Args:
        case: What the updates have in common.
        found: Of each update.
        texts: Behind each, as ids.
        common: Tokens of public text, the commonest first.
    """
    if case.side == "output":
        truths = [{token for ids_T in chunk for token in ids_T[1:].tolist()} for chunk in texts]
        present = truths
    else:
        # The last token of a text carries no loss, and without noise no gradient comes back to it.
        truths = [{token for ids_T in chunk for token in ids_T[:-1].tolist()} for chunk in texts]
        present = [{token for ids_T in chunk for token in ids_T.tolist()} for chunk in texts]
    there = [len(truth & set(one.found)) for one, truth in zip(found, present, strict=True)]
    return result_of(case, found, truths, common, there)


def result_of(
    case: Case,
    found: Sequence[SpanFindings],
    truths: Sequence[set[int]],
    common: Sequence[int],
    there: Sequence[int],
) -> UpdateInversion:
    """The same of tokens.

    Args:
        case: See `scored`, as are `found` and `common`.
        found: Of each update.
        truths: Tokens behind each.
        common: The commonest tokens.
        there: How many of the tokens that were named of each update are in its texts at all.
    """
    hits_U = np.array([len(truth & set(one.found)) for one, truth in zip(found, truths, strict=True)])
    counts_UK = np.stack([hits_U, there, [len(one.found) for one in found], [len(truth) for truth in truths]], axis=1)
    right_UC = np.array([[token in truth for token in common] for truth in truths]).cumsum(axis=1)
    ones_1U = np.ones((1, len(truths)))
    draws = np.random.default_rng(0).integers(0, len(truths), (_DRAWS, len(truths)))
    drawn_DU = np.stack([np.bincount(draw, minlength=len(truths)) for draw in draws])
    quality, guess_quality = (float(values[0]) for values in _qualities(ones_1U, counts_UK, right_UC))
    qualities_D, guesses_D = _qualities(drawn_DU, counts_UK, right_UC)
    lucky = sum(len(truth & set(common[: len(one.found)])) for one, truth in zip(found, truths, strict=True))
    total = sum(len(truth) for truth in truths)
    hits, present, named, _ = counts_UK.sum(axis=0).tolist()
    recall = hits / total
    return UpdateInversion(
        kind=case.kind,
        clients=case.clients,
        sequences=case.sequences,
        steps=case.steps,
        num_tokens=total,
        recall=recall,
        precision=present / max(1, named),
        guess=lucky / total,
        conclusive=sum(one.conclusive for one in found) / len(found),
        method=Counter(one.method for one in found).most_common(1)[0][0] if found else NOTHING.method,
        quality=quality,
        guess_quality=guess_quality,
        side=case.side,
        updates=len(truths),
        excess_share_low=float(np.quantile((qualities_D - guesses_D) / np.maximum(1 - guesses_D, 1e-9), _TAIL)),
    )


def _qualities(
    weights_DU: npt.NDArray[Any], counts_UK: npt.NDArray[Any], right_UC: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """F1 [D] of what was named, and the best of naming the commonest tokens for every update, over how many are named.

    Args:
        weights_DU: How often each update counts.
        counts_UK: Tokens of each that were named rightly, named and there, named, and to be named.
        right_UC: How many of its first so many of the commonest tokens are right.
    """
    hits_D, there_D, named_D, total_D = (weights_DU @ counts_UK).T
    precision_D, recall_D = there_D / np.maximum(named_D, 1), hits_D / np.maximum(total_D, 1)
    sizes_C = np.arange(1, right_UC.shape[1] + 1)
    guesses_DC = 2 * (weights_DU @ right_UC) / (total_D[:, None] + sizes_C * weights_DU.sum(axis=1)[:, None])
    best_D = guesses_DC.max(axis=1, initial=0.0)
    return 2 * precision_D * recall_D / np.maximum(precision_D + recall_D, 1e-9), best_D
