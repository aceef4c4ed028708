"""A7, the uploaded update: which tokens the gradient, or the change, of a client's input side was made of.

It is attacked as the server receives it: of one client, and of the sum that secure aggregation leaves. Noise on the
forward channel does not touch it, since the client's own gradients are taken at its clean inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.update_inversion import NOTHING, SpanFindings, invert, token_inputs
from fedsea.audit.targets import Progress, Target, unheard
from fedsea.audit.training import SplitRun, Tensors, batches_of, pack
from fedsea.audit.verdict import Verdict

_WARM_UP_STEPS = 5
"""Steps on public text first: LoRA's factor B begins at zero, so in the first step of all A has no gradient."""

_SUMMED_CLIENTS = 3

_ROUND_STEPS = 2
"""Steps of the first round, which is the one that tells most: later ones carry the moments of all before."""

_MOST_UPDATES = 24


_EXPOSED_EXCESS = 0.5
_CLEAR_EXCESS = 0.05


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

    @property
    def excess_share(self) -> float:
        """How much better than guessing, as a share of what the guess leaves open; negative if it was worse."""
        return (self.quality - self.guess_quality) / max(1.0 - self.guess_quality, 1e-9)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """All kinds of update that leave under a plan."""

    cases: tuple[UpdateInversion, ...]

    @property
    def worst(self) -> UpdateInversion | None:
        """The one that told most."""
        return max(self.cases, key=lambda case: case.excess_share, default=None)

    @property
    def verdict(self) -> Verdict:
        """By how far the worst update's F1 is above that of guessing: few of many named tokens right is no exposure."""
        if (worst := self.worst) is None or worst.excess_share <= _CLEAR_EXCESS:
            return Verdict.NOT_RECOVERED
        return Verdict.EXPOSED if worst.excess_share > _EXPOSED_EXCESS else Verdict.PARTIAL

    @property
    def sentence(self) -> str:
        """The worst update in one line."""
        if (worst := self.worst) is None:
            return "No update of the client's input side leaves it."
        of = "one client" if worst.clients == 1 else f"the sum of {worst.clients} clients"
        return (
            f"From a {worst.kind} of {of}, {worst.sequences} text(s) each, {worst.recall:.1%} of the distinct tokens "
            f"were named ({worst.precision:.1%} of those named were there; guessing the commonest names "
            f"{worst.guess:.1%}): F1 {worst.quality:.2f}, and {worst.guess_quality:.2f} by guessing."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the worst update its recall, that of guessing, and the difference, as other attacks have."""
        values = {"cases": [asdict(case) for case in self.cases], "sentence": self.sentence}
        if (worst := self.worst) is None:
            return values
        figures = {"recovery": worst.recall, "prior": worst.guess, "excess": worst.recall - worst.guess}
        return {name: round(value, 6) for name, value in figures.items()} | values


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> UpdateReport:
    """Attack the updates that this plan lets leave, made of the targets' texts.

    Args:
        attacker: What the server knows; its public texts warm the adapters up.
        targets: Their ids make the updates.
        progress: Told of every kind of update.

    Returns:
        Nothing, if the clients' parameters stay at home (`sync = "personal"`) or nothing of the input side is trained.
    """
    plan = attacker.plan
    if plan.aggregation.sync == "personal" or not plan.trains_below_cut(plan.client_names[0]):
        return UpdateReport(())
    inputs = token_inputs(attacker.input_blocks, attacker.vocab_size)
    texts = [target.ids_T.long() for target in targets]
    public = [ids_T.long() for ids_T in attacker.public] or texts
    common = [token for token, _ in Counter(t for ids_T in public for t in ids_T.tolist()).most_common()]
    micro_batch = plan.micro_batches_of(plan.client_names[0])[1]
    by_step = plan.aggregation.sync == "step"
    split = SplitRun(plan, attacker.base.checkpoint)
    if by_step:
        split.train(batches_of(public, micro_batch, _WARM_UP_STEPS, attacker.seed))

    def update(texts: Sequence[torch.Tensor]) -> Tensors:
        return _gradient(split, texts) if by_step else _difference(attacker, texts)

    results = []
    # Secure aggregation shows the server sums alone; without it a single client's update is there to be had.
    members = (_SUMMED_CLIENTS,) if plan.aggregation.secure else (1, _SUMMED_CLIENTS)
    cases = [(size, clients) for size in sorted({1, micro_batch}) for clients in members]
    for number, (size, clients) in enumerate(cases):
        progress(number, len(cases))
        chunks = [texts[i : i + size * clients] for i in range(0, len(texts) - size * clients + 1, size * clients)]
        if chunks:
            steps = 1 if by_step else _ROUND_STEPS
            results.append(_attack(update, chunks[:_MOST_UPDATES], size, clients, steps, inputs, common))
    progress(len(cases), len(cases))
    return UpdateReport(tuple(results))


def _attack(
    update: Callable[[Sequence[torch.Tensor]], Tensors],
    chunks: Iterable[Sequence[torch.Tensor]],
    size: int,
    clients: int,
    steps: int,
    inputs: dict[str, torch.Tensor],
    common: Sequence[int],
) -> UpdateInversion:
    found, truths, present = [], [], []
    for texts in chunks:
        updates = [update(texts[start : start + size]) for start in range(0, len(texts), size)]
        summed = {name: torch.stack([one[name] for one in updates]).sum(0) for name in updates[0]}
        found.append(invert(summed, inputs))
        # The last token of a text carries no loss, and without noise no gradient comes back to it.
        truths.append({token for ids_T in texts for token in ids_T[:-1].tolist()})
        present.append({token for ids_T in texts for token in ids_T.tolist()})
    there = sum(len(truth & set(one.found)) for one, truth in zip(found, present, strict=True))
    named = sum(len(one.found) for one in found)
    kind = "gradient" if steps == 1 else "difference"
    return _result(kind, clients, size, steps, found, truths, common, there / max(1, named))


def _gradient(split: SplitRun, texts: Sequence[torch.Tensor]) -> Tensors:
    return split.gradients(pack(texts))[1]


def _difference(attacker: Attacker, texts: Sequence[torch.Tensor]) -> Tensors:
    """What changed at one client in a first round over these texts."""
    split = SplitRun(attacker.plan, attacker.base.checkpoint)
    before = split.segments.parameters()
    split.train([pack(texts)] * _ROUND_STEPS)
    return split.update(before)


def _result(
    kind: str,
    clients: int,
    size: int,
    steps: int,
    found: Sequence[SpanFindings],
    truths: Sequence[set[int]],
    common: Sequence[int],
    precision: float,
) -> UpdateInversion:
    hits = sum(len(truth & set(one.found)) for one, truth in zip(found, truths, strict=True))
    lucky = sum(len(truth & set(common[: len(one.found)])) for one, truth in zip(found, truths, strict=True))
    total = sum(len(truth) for truth in truths)
    method = Counter(one.method for one in found).most_common(1)[0][0] if found else NOTHING.method
    conclusive = sum(one.conclusive for one in found) / len(found)
    recall = hits / total
    quality = 2 * precision * recall / max(precision + recall, 1e-9)
    guess = _best_guess(truths, common)
    return UpdateInversion(
        kind, clients, size, steps, total, recall, precision, lucky / total, conclusive, method, quality, guess
    )


def _best_guess(truths: Sequence[set[int]], common: Sequence[int]) -> float:
    """The best F1 of naming the commonest tokens for every update, over how many are named."""
    total, right, best = sum(len(truth) for truth in truths), 0, 0.0
    for number, token in enumerate(common):
        right += sum(token in truth for truth in truths)
        best = max(best, 2 * right / (total + (number + 1) * len(truths)))
    return best
