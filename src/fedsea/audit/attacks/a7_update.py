"""A7, the uploaded update: which tokens the gradient, or the change, of a client's segments was made of.

It is attacked as the server receives it: of one client, and of the sum that secure aggregation leaves. Noise on the
forward channel does not touch it: the input side's gradients are taken at its clean inputs, the output side's at what
the server itself computed. The input side names the tokens that were read, the output side those that followed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.output_inversion import name_labels
from fedsea.audit.attacks.update_inversion import NOTHING, SpanFindings, invert, token_inputs
from fedsea.audit.targets import OutOfTime, Progress, Target, unheard
from fedsea.audit.training import SplitRun, Tensors, batches_of, pack
from fedsea.audit.verdict import Verdict
from fedsea.plan import open_channels
from fedsea.plan.trust import trains_output
from fedsea.types import Channel

_WARM_UP_STEPS = 5
"""Steps on public text first: LoRA's factor B begins at zero, so in the first step of all A has no gradient."""

_SUMMED_CLIENTS = 3
"""At most: fewer if the plan has fewer."""

_ROUND_STEPS = 2
"""Steps of the first round, which is the one that tells most: later ones carry the moments of all before."""

_MOST_UPDATES = 24
_MOST_MATCHED = 4
"""Of a kind, whose output side is matched: each takes as long as some tens of steps."""

_EXPOSED_EXCESS = 0.5
_CLEAR_EXCESS = 0.05
_CERTAIN_UPDATES = 6
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
    def certain(self) -> bool:
        """Whether it was better than guessing, and not by chance."""
        clear = self.updates >= _CERTAIN_UPDATES or self.excess_share > _CLEAR_EXCESS
        return clear and self.excess_share_low > 0


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """All kinds of update that leave under a plan.

    Attributes:
        cases: Those that were attacked.
        cut_short: The time was up before all were.
    """

    cases: tuple[UpdateInversion, ...]
    cut_short: bool = False

    @property
    def worst(self) -> UpdateInversion | None:
        """The one that told most."""
        return max(self.cases, key=_told_most, default=None)

    @property
    def verdict(self) -> Verdict:
        """By how far the worst update's F1 is above that of guessing: few of many named tokens right is no exposure."""
        worst = self.worst
        if worst is not None and worst.excess_share > _EXPOSED_EXCESS:
            return Verdict.EXPOSED
        if self.cut_short:
            return Verdict.INCONCLUSIVE
        return Verdict.PARTIAL if any(case.certain for case in self.cases) else Verdict.NOT_RECOVERED

    @property
    def sentence(self) -> str:
        """The worst update in one line."""
        if (worst := self.worst) is None:
            return "No update that names tokens leaves this client."
        of = "one client" if worst.clients == 1 else f"the sum of {worst.clients} clients"
        said = (
            f"From a {worst.kind} of the {worst.side} side of {of}, {worst.sequences} text(s) each, {worst.recall:.1%} "
            f"of the distinct tokens were named ({worst.precision:.1%} of those named were there; guessing the "
            f"commonest names {worst.guess:.1%}): F1 {worst.quality:.2f}, and {worst.guess_quality:.2f} by guessing."
        )
        if not worst.certain:
            said += " That is no certain excess."
        if self.cut_short:
            said += " The time was up before all kinds of update were attacked."
        return said

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the worst update its recall, that of guessing, and the difference, as other attacks have."""
        values = {"cases": [asdict(case) for case in self.cases], "sentence": self.sentence}
        if (worst := self.worst) is None:
            return values
        figures = {"recovery": worst.recall, "prior": worst.guess, "excess": worst.recall - worst.guess}
        return {name: round(value, 6) for name, value in figures.items()} | values


def _told_most(case: UpdateInversion) -> tuple[bool, bool, float]:
    return case.excess_share > _EXPOSED_EXCESS, case.certain, case.excess_share


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> UpdateReport:
    """Attack the updates that this plan lets leave, made of the targets' texts.

    Args:
        attacker: What the server knows; its public texts warm the adapters up.
        targets: Their ids make the updates.
        progress: Told of every kind of update.

    Returns:
        Nothing, if the clients' parameters stay at home (`sync = "personal"`) or nothing of theirs is trained.
    """
    if Channel.UPDATE not in open_channels(attacker.plan, attacker.plan.client_names[0]):
        return UpdateReport(())
    found: list[UpdateInversion] = []
    try:
        found.extend(_Updates(attacker, [target.ids_T.long() for target in targets]).attacked(progress))
    except OutOfTime:
        if not found:
            raise
        return UpdateReport(tuple(found), cut_short=True)
    return UpdateReport(tuple(found))


class _Updates:
    """The updates that texts make under a plan.

    Args:
        attacker: See `run`.
        texts: As ids.
    """

    def __init__(self, attacker: Attacker, texts: Sequence[torch.Tensor]) -> None:
        self._attacker, self._texts = attacker, texts
        plan = self._plan = attacker.plan
        name = plan.client_names[0]
        public = [ids_T.long() for ids_T in attacker.public] or list(texts)
        tokens = Counter(token for ids_T in public for token in ids_T.tolist())
        self._common = [token for token, _ in tokens.most_common()]
        self._micro_batch = plan.micro_batches_of(name)[1]
        self._by_step = plan.aggregation.sync == "step"
        trained = (("input", plan.trains_below_cut(name)), ("output", trains_output(plan, name)))
        self._sides = [side for side, is_trained in trained if is_trained]
        self._inputs = token_inputs(attacker.input_blocks, attacker.vocab_size) if self._sides[0] == "input" else {}
        self._start = SplitRun(plan, attacker.base.checkpoint, key=attacker.noise_key("A7"))
        self._made = 0
        if self._by_step:
            self._start.train(batches_of(public, self._micro_batch, _WARM_UP_STEPS, attacker.seed))

    def attacked(self, progress: Progress) -> Iterator[UpdateInversion]:
        """Every kind of update that the texts suffice for, as soon as it was attacked."""
        # Secure aggregation shows the server sums alone; without it a single client's update is there to be had.
        summed = min(_SUMMED_CLIENTS, self._attacker.num_clients or len(self._plan.client_names))
        members = {summed} if self._plan.aggregation.secure else {1, summed}
        kinds = [(size, clients) for size in sorted({1, self._micro_batch}) for clients in sorted(members)]
        for number, (size, clients) in enumerate(kinds):
            progress(number, len(kinds))
            told = functools.partial(_told, progress, number, len(kinds))
            together = size * clients
            chunks = [self._texts[at : at + together] for at in range(0, len(self._texts) - together + 1, together)]
            cuts = [[chunk[at : at + size] for at in range(0, together, size)] for chunk in chunks[:_MOST_UPDATES]]
            made = [[self._update(part) for part in parts] for parts in cuts]
            for side in self._sides if chunks else ():
                most = _MOST_UPDATES if side == "input" else _MOST_MATCHED
                found = [self._invert(updates, side, told) for updates in made[:most]]
                kind, steps = ("gradient", 1) if self._by_step else ("difference", _ROUND_STEPS)
                case = _Case(kind, clients, size, steps, side)
                yield _scored(case, found, chunks[: len(found)], self._common)
        progress(len(kinds), len(kinds))

    def _update(self, texts: Sequence[torch.Tensor]) -> _Update:
        if self._by_step:
            return _gradient(self._start, texts)
        self._made += 1  # no two clients' updates are under the same noise, which would add up in their sum
        return _difference(self._attacker, texts, self._attacker.noise_key("A7", self._made))

    def _invert(self, updates: Sequence[_Update], side: str, progress: Progress) -> SpanFindings:
        summed = {name: torch.stack([one.tensors[name] for one in updates]).sum(0) for name in updates[0].tensors}
        if side == "input":
            return invert(summed, self._inputs)
        return name_labels(
            self._start.segments.output_blocks,
            {name: -tensor for name, tensor in summed.items()} if self._by_step else summed,
            torch.cat([one.output_TH for one in updates]),
            [length for one in updates for length in one.lengths],
            gradient=self._by_step,
            noise_std=self._attacker.noise_std.get(Channel.UPDATE, 0.0) * len(updates) ** 0.5,
            progress=progress,
        )


def _told(progress: Progress, number: int, total: int, _done: int, _all: int) -> None:
    """Within one case: shows nothing new, and ends when the time is up."""
    progress(number, total)


@dataclass(frozen=True, slots=True)
class _Update:
    """What the server has of one client's update: its tensors, and its own outputs for the texts behind it."""

    tensors: Tensors
    output_TH: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    """See the fields of `UpdateInversion`."""

    kind: str
    clients: int
    sequences: int
    steps: int
    side: str


def _scored(
    case: _Case, found: Sequence[SpanFindings], texts: Sequence[Sequence[torch.Tensor]], common: Sequence[int]
) -> UpdateInversion:
    if case.side == "output":
        truths = [{token for ids_T in chunk for token in ids_T[1:].tolist()} for chunk in texts]
        present = truths
    else:
        # The last token of a text carries no loss, and without noise no gradient comes back to it.
        truths = [{token for ids_T in chunk for token in ids_T[:-1].tolist()} for chunk in texts]
        present = [{token for ids_T in chunk for token in ids_T.tolist()} for chunk in texts]
    there = [len(truth & set(one.found)) for one, truth in zip(found, present, strict=True)]
    return _result(case, found, truths, common, there)


def _gradient(split: SplitRun, texts: Sequence[torch.Tensor]) -> _Update:
    batch = pack(texts)
    tensors = split.gradients(batch)[1]
    return _Update(tensors, split.output_TH, batch.lengths)


def _difference(attacker: Attacker, texts: Sequence[torch.Tensor], key: bytes) -> _Update:
    """What changed at one client in a first round over these texts, and the outputs of its first step."""
    split, batch = SplitRun(attacker.plan, attacker.base.checkpoint, key=key), pack(texts)
    before = split.segments.parameters()
    split.train([batch])
    output_TH = split.output_TH
    split.train([batch] * (_ROUND_STEPS - 1))
    return _Update(split.update(before), output_TH, batch.lengths)


def _result(
    case: _Case,
    found: Sequence[SpanFindings],
    truths: Sequence[set[int]],
    common: Sequence[int],
    there: Sequence[int],
) -> UpdateInversion:
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
