"""How much of a text was recovered, and how much of that anybody could have guessed.

Rates are over tokens; intervals are bootstrapped over sequences, which are what is independent. The same seed gives
the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsea.audit.targets import Recovered, Target

_DRAWS = 2000
_COVERAGE = 0.95

PLANTED, OWN = "planted", "own texts"
"""The sets of texts that are scored each by itself, where there are both."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score:
    """What one attack got out of one channel.

    Attributes:
        recovery: Share of tokens that are right.
        prior: Share that the public model's own guess gets right, given the true tokens before each.
        excess: `recovery - prior`.
        excess_share: The excess as a share of what the prior leaves open, so that a good prior does not hide a leak; 0
            where it leaves nothing open.
        exact: Share of sequences without a wrong token.
        rouge_l: Mean ROUGE-L (F1 over tokens).
        identifiers: Type to share of the planted identifiers of that type that stand in the recovered text letter by
            letter, less what the prior gets of them.
        num_identifiers: Type to how many were planted.
        num_tokens: Tokens that were scored.
        num_sequences: Sequences.
        shortlist_recall: Least of the attack's answers.
        notes: What the attack said about itself.
        cut_short: The time was up before it had put together all that it saw, or had learned all that it can.
    """

    recovery: Rate
    prior: Rate
    excess: Rate
    excess_share: Rate
    exact: float
    rouge_l: float
    identifiers: dict[str, float]
    num_identifiers: dict[str, int]
    num_tokens: int
    num_sequences: int
    shortlist_recall: float = 1.0
    notes: tuple[str, ...] = field(default=())
    cut_short: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values: rates as numbers, their intervals beside them."""
        plain = asdict(self)
        for name in ("recovery", "prior", "excess", "excess_share"):
            rate = plain.pop(name)
            plain |= {name: rate["value"], f"{name}_interval": [rate["low"], rate["high"]]}
        return {key: _rounded(value) for key, value in plain.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def score(
    targets: Sequence[Target],
    answers: Sequence[Recovered],
    guesses: Sequence[torch.Tensor],
    decode: Decode,
    seed: int = 0,
) -> Score:
    """Score an attack's answers.

    Args:
        targets: The truth.
        answers: One for each.
        guesses: The prior's guess at every position of each, given the true tokens before it.
        decode: Ids to text.
        seed: Of the bootstrap.
    """
    counts = np.zeros((len(targets), 3))  # right, guessed right, scored
    exact, rouge = [], []
    found: dict[str, list[float]] = {}
    for row, (target, answer, guess) in enumerate(zip(targets, answers, guesses, strict=True)):
        truth, said = target.ids_T.long(), answer.ids_T.long()
        scored = torch.ones_like(truth, dtype=torch.bool) if answer.scored_T is None else answer.scored_T.clone()
        scored[: target.begins] = False
        right, guessed = (said == truth) & scored, (guess == truth) & scored
        counts[row] = int(right.sum()), int(guessed.sum()), int(scored.sum())
        if not scored.any():
            continue
        exact.append(float(right.sum() == scored.sum()))
        rouge.append(rouge_l(said[scored].tolist(), truth[scored].tolist()))
        texts = decode(said[target.begins :].tolist()), decode(guess[target.begins :].tolist())
        for secret in target.secrets:
            hit, lucky = (float(secret.text in text) for text in texts)
            found.setdefault(secret.kind, []).append(hit - lucky)
    rates = _rates(counts, seed)
    identifiers = {kind: max(0.0, sum(hits) / len(hits)) for kind, hits in sorted(found.items())}
    return Score(
        *rates,
        exact=float(np.mean(exact)) if exact else 0.0,
        rouge_l=float(np.mean(rouge)) if rouge else 0.0,
        identifiers=identifiers,
        num_identifiers={kind: len(hits) for kind, hits in sorted(found.items())},
        num_tokens=int(counts[:, 2].sum()),
        num_sequences=len(targets),
        shortlist_recall=min((answer.shortlist_recall for answer in answers), default=1.0),
        notes=tuple(dict.fromkeys(answer.note for answer in answers if answer.note)),
        cut_short=any(answer.cut_short for answer in answers),
    )


def score_sets(
    targets: Sequence[Target],
    answers: Sequence[Recovered],
    guesses: Sequence[torch.Tensor],
    decode: Decode,
    seed: int = 0,
) -> dict[str, Score]:
    """Planted notes and the user's own texts each by themselves; nothing if not both are there.

    What one set shows is not to be diluted by the other: notes are full of letters that no model can know.

    Args:
        targets: The truth; this and all others as in `score`.
        answers: One for each.
        guesses: Likewise.
        decode: Ids to text.
        seed: Of the bootstrap.
    """
    found = {}
    for name, is_own in ((PLANTED, False), (OWN, True)):
        ours = [i for i, target in enumerate(targets) if target.own is is_own]
        if ours and len(ours) < len(targets):
            picked = [targets[i] for i in ours], [answers[i] for i in ours], [guesses[i] for i in ours]
            found[name] = score(*picked, decode, seed)
    return {name: one for name, one in found.items() if one.num_tokens}


def _rates(counts: npt.NDArray[np.float64], seed: int) -> tuple[Rate, Rate, Rate, Rate]:
    """Recovery, prior, excess and its share, with percentile intervals over resampled sequences."""
    draws = np.random.default_rng(seed).integers(0, len(counts), (_DRAWS, len(counts)))
    sums = np.concatenate([counts.sum(axis=0)[None], counts[draws].sum(axis=1)])
    right, guessed, scored = sums[:, 0], sums[:, 1], np.maximum(sums[:, 2], 1)
    left = scored - guessed
    share = np.where(left > 0, (right - guessed) / np.maximum(left, 1), 0.0)
    series = (right / scored, guessed / scored, (right - guessed) / scored, share)
    tail = (1 - _COVERAGE) / 2
    rates = []
    for values in series:
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        rates.append(Rate(float(values[0]), float(low), float(high)))
    return rates[0], rates[1], rates[2], rates[3]


def rouge_l(said: Sequence[int], truth: Sequence[int]) -> float:
    """F1 of the longest common subsequence.

    >>> rouge_l([1, 2, 3, 4], [1, 3, 4, 5])
    0.75
    """
    if not said or not truth:
        return 0.0
    lengths = np.zeros(len(truth) + 1, dtype=np.int64)
    wanted = np.asarray(truth)
    for token in said:
        longer = np.where(wanted == token, lengths[:-1] + 1, lengths[1:])
        lengths[1:] = np.maximum.accumulate(np.maximum(longer, lengths[1:]))
    return 2 * int(lengths[-1]) / (len(said) + len(truth))
