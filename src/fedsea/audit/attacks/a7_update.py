"""A7, the uploaded update: which tokens the gradient, or the change, of a client's segments was made of.

It is attacked as the server receives it: of one client, and of the sum that secure aggregation leaves. Noise on the
forward channel does not touch it: the input side's gradients are taken at its clean inputs, the output side's at what
the server itself computed. The input side names the tokens that were read, the output side those that followed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.output_inversion import name_labels
from fedsea.audit.attacks.update_inversion import SpanFindings, invert, token_inputs
from fedsea.audit.attacks.update_scoring import CERTAIN_UPDATES, Case, UpdateInversion, scored
from fedsea.audit.scoring import OWN, PLANTED
from fedsea.audit.targets import OutOfTime, Progress, Target, unheard, within
from fedsea.audit.training import SplitRun, Tensors, batches_of, pack
from fedsea.audit.verdict import Verdict
from fedsea.plan import open_channels
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


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """All kinds of update that leave under a plan.

    Attributes:
        cases: Those that were attacked.
        cut_short: The time was up before all were.
        sets: The same of updates that were made of planted notes, and of own texts, alone, where there are others, too.
    """

    cases: tuple[UpdateInversion, ...]
    cut_short: bool = False
    sets: Mapping[str, UpdateReport] = field(default_factory=dict)

    @property
    def worst(self) -> UpdateInversion | None:
        """The one that told most."""
        return max(self.cases, key=_told_most, default=None)

    @property
    def verdict(self) -> Verdict:
        """By how far the worst update's F1 is above that of guessing: few of many named tokens right is no exposure.

        The worst of all updates together and of each set by itself; of a few updates alone no excess is certain.
        """
        apart = [case for one in self.sets.values() for case in one.cases]
        cases = [*self.cases, *(case for case in apart if case.exposed or case.updates >= CERTAIN_UPDATES)]
        if any(case.exposed for case in cases):
            return Verdict.EXPOSED
        if self.cut_short:
            return Verdict.INCONCLUSIVE
        return Verdict.PARTIAL if any(case.certain for case in cases) else Verdict.NOT_RECOVERED

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
        apart = [(name, told) for name, one in self.sets.items() if (told := one.worst)]
        if apart:
            figures = [f"{name} {told.quality:.2f} ({told.guess_quality:.2f})" for name, told in apart]
            said += f" F1, and that of guessing, of each by itself: {', '.join(figures)}."
        if self.cut_short:
            said += " The time was up before all kinds of update were attacked."
        return said

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the worst update its recall, that of guessing, and the difference, as other attacks have."""
        values: dict[str, Any] = {"cases": [asdict(case) for case in self.cases], "sentence": self.sentence}
        if self.sets:
            values["sets"] = {name: one.to_json() for name, one in self.sets.items()}
        if (worst := self.worst) is None:
            return values
        figures = {"recovery": worst.recall, "prior": worst.guess, "excess": worst.recall - worst.guess}
        return {name: round(value, 6) for name, value in figures.items()} | values


def _told_most(case: UpdateInversion) -> tuple[bool, bool, float]:
    return case.exposed, case.certain, case.excess_share


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
    cases: list[UpdateInversion] = []
    sets: dict[str, list[UpdateInversion]] = {}
    cut_short = False
    try:
        for case, of_sets in _Updates(attacker, targets).attacked(progress):
            cases.append(case)
            for name, one in of_sets.items():
                sets.setdefault(name, []).append(one)
    except OutOfTime:
        if not cases:
            raise
        cut_short = True
    return UpdateReport(tuple(cases), cut_short, {name: UpdateReport(tuple(ones)) for name, ones in sets.items()})


class _Updates:
    """The updates that texts make under a plan.

    Args:
        attacker: See `run`.
        targets: Planted notes and own texts.
    """

    def __init__(self, attacker: Attacker, targets: Sequence[Target]) -> None:
        self._attacker = attacker
        self._texts = {
            name: [target.ids_T.long() for target in targets if target.own is is_own]
            for name, is_own in ((PLANTED, False), (OWN, True))
        }
        plan = self._plan = attacker.plan
        name = plan.client_names[0]
        public = [ids_T.long() for ids_T in attacker.public] or [target.ids_T.long() for target in targets]
        tokens = Counter(token for ids_T in public for token in ids_T.tolist())
        self._common = [token for token, _ in tokens.most_common()]
        self._micro_batch = plan.micro_batches_of(name)[1]
        self._by_step = plan.aggregation.sync == "step"
        trained = (("input", plan.trains_below_cut(name)), ("output", plan.trains_output(name)))
        self._sides = [side for side, is_trained in trained if is_trained]
        self._inputs = token_inputs(attacker.input_blocks, attacker.vocab_size) if self._sides[0] == "input" else {}
        self._start = SplitRun(plan, attacker.base.checkpoint, key=attacker.noise_key("A7"))
        self._begins = {} if self._by_step else self._start.parameters()
        self._made = 0
        if self._by_step:
            self._start.train(batches_of(public, self._micro_batch, _WARM_UP_STEPS, attacker.seed))

    def attacked(self, progress: Progress) -> Iterator[tuple[UpdateInversion, dict[str, UpdateInversion]]]:
        """Every kind of update that the texts suffice for, and its sets of texts, as soon as it was attacked."""
        # Secure aggregation shows the server sums alone; without it a single client's update is there to be had.
        summed = min(_SUMMED_CLIENTS, self._attacker.num_clients or len(self._plan.client_names))
        members = {summed} if self._plan.aggregation.secure else {1, summed}
        kinds = [(size, clients) for size in sorted({1, self._micro_batch}) for clients in sorted(members)]
        for number, (size, clients) in enumerate(kinds):
            progress(number, len(kinds))
            told = within(progress, number, len(kinds))
            together = size * clients
            chunks = self._chunks(together)[:_MOST_UPDATES]
            cuts = [[chunk.texts[at : at + size] for at in range(0, together, size)] for chunk in chunks]
            made = [[self._update(part) for part in parts] for parts in cuts]
            for side in self._sides if chunks else ():
                most = _MOST_UPDATES if side == "input" else _MOST_MATCHED
                found = [self._invert(updates, side, told) for updates in made[:most]]
                kind, steps = ("gradient", 1) if self._by_step else ("difference", _ROUND_STEPS)
                yield self._scored(Case(kind, clients, size, steps, side), found, chunks[: len(found)])
        progress(len(kinds), len(kinds))

    def _chunks(self, together: int) -> list[_Chunk]:
        """Texts of one update each: planted notes and own texts by turns, and at last of both what was left over."""
        rows, left = [], []
        for name, texts in self._texts.items():
            whole = len(texts) - len(texts) % together
            rows.append([_Chunk(texts[at : at + together], name) for at in range(0, whole, together)])
            left += texts[whole:]
        mixed = [_Chunk(left[at : at + together]) for at in range(0, len(left) - together + 1, together)]
        return [chunk for turn in itertools.zip_longest(*rows) for chunk in turn if chunk is not None] + mixed

    def _scored(
        self, case: Case, found: Sequence[SpanFindings], chunks: Sequence[_Chunk]
    ) -> tuple[UpdateInversion, dict[str, UpdateInversion]]:
        """All updates together, and those of a set of texts alone if there are others."""

        def of(picked: Sequence[int]) -> UpdateInversion:
            return scored(case, [found[i] for i in picked], [chunks[i].texts for i in picked], self._common)

        ours = {name: [i for i, chunk in enumerate(chunks) if chunk.whose == name] for name in self._texts}
        apart = {name: of(picked) for name, picked in ours.items() if 0 < len(picked) < len(chunks)}
        return of(range(len(chunks))), apart

    def _update(self, texts: Sequence[torch.Tensor]) -> _Update:
        if self._by_step:
            return _gradient(self._start, texts)
        self._made += 1  # no two clients' updates are under the same noise, which would add up in their sum
        self._start.begin_again(self._begins, self._attacker.noise_key("A7", self._made))
        update = _difference(self._start, texts)
        self._start.begin_again(self._begins)
        return update

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


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The texts of one update, as ids, and which set they are of; "" if of several."""

    texts: Sequence[torch.Tensor]
    whose: str = ""


@dataclass(frozen=True, slots=True)
class _Update:
    """What the server has of one client's update: its tensors, and its own outputs for the texts behind it."""

    tensors: Tensors
    output_TH: torch.Tensor
    lengths: tuple[int, ...]


def _gradient(split: SplitRun, texts: Sequence[torch.Tensor]) -> _Update:
    batch = pack(texts)
    tensors = split.gradients(batch)[1]
    return _Update(tensors, split.output_TH, batch.lengths)


def _difference(split: SplitRun, texts: Sequence[torch.Tensor]) -> _Update:
    """What changes at one client in a first round over these texts, and the outputs of its first step."""
    batch, before = pack(texts), split.segments.parameters()
    split.train([batch])
    output_TH = split.output_TH
    split.train([batch] * (_ROUND_STEPS - 1))
    return _Update(split.update(before), output_TH, batch.lengths)
