"""One point of the study: a cut, a noise, a training; what the attacks get out of it and what the model is worth.

H  hidden size
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedsea.audit.attacker import Attacker, BaseModel
from fedsea.audit.attacks import a0_prior, a1_nearest, a2_likelihood, a3_inverter, a4_averaging, a5_labels
from fedsea.audit.observe import Tap
from fedsea.audit.scoring import Score, score
from fedsea.audit.targets import Recovered, Target
from fedsea.audit.training import SplitRun, batches_of, pack
from fedsea.client import setup
from fedsea.data.tokenizer import beginning_of, load_tokenizer
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.plan import FederationPlan, parse_plan
from fedsea.types import IGNORE, Channel, Partition

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        targets: Texts under attack.
        tokens: Longest text.
        held: Texts that perplexity is taken on.
        public: Texts that training and the learned attack may use.
        steps: Of training.
        batch: Texts of a step.
        beam: Of the searches.
        inverter_s: Seconds that the learned inverter may train.
        inside: Texts are windows from anywhere inside of theirs, behind the beginning token.
    """

    targets: int
    tokens: int
    held: int
    public: int
    steps: int
    batch: int
    beam: int
    inverter_s: float
    inside: bool = False


FULL = Sizes(targets=12, tokens=48, held=48, public=600, steps=100, batch=8, beam=4, inverter_s=60.0)
TINY = Sizes(targets=2, tokens=12, held=4, public=40, steps=2, batch=4, beam=2, inverter_s=0.5)


@dataclass
class Study:
    """A model, texts, and what is shared by all points.

    Attributes:
        model: Folder of the base model.
        sizes: How much of everything.
    """

    model: str
    sizes: Sizes
    attacked: list[torch.Tensor] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    public: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(self.model)
        self.vocab_size = int(self.checkpoint.config.get_text_config(decoder=True).vocab_size)
        self.tokenizer = load_tokenizer(self.model, vocab_size=self.vocab_size)
        self.beginning = tuple(beginning_of(self.tokenizer))
        self._guesses: list[torch.Tensor] = []

    def read(self, files: Sequence[Path]) -> None:
        """Take texts of JSON lines: the first ones are attacked, the next held out, the rest is public."""
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        draw, found = random.Random(0), []
        for row in rows:
            text = row["text"] if "text" in row else " ".join(str(v) for v in row.values())
            ids = self._part(list(self.tokenizer(text)["input_ids"]), draw)
            if len(ids) >= self.sizes.tokens // 2:
                found.append(torch.tensor(ids))
        first, second = self.sizes.targets, self.sizes.targets + self.sizes.held
        self.attacked, self.held = found[:first], found[first:second]
        self.public = found[second : second + self.sizes.public]
        if not self.public:
            raise SystemExit(f"Of {len(rows)} rows {len(found)} are long enough; the study needs more than {second}.")

    def _part(self, ids: list[int], draw: random.Random) -> list[int]:
        """As many of a text's tokens as are wanted, or none of one that is too short for a window."""
        if not self.sizes.inside:
            return ids[: self.sizes.tokens]
        begins = len(self.beginning)
        wanted = self.sizes.tokens - begins
        if len(ids) - begins <= wanted:
            return []
        start = draw.randrange(begins, len(ids) - wanted)
        return [*self.beginning, *ids[start : start + wanted]]

    # --- what a point is made of --------------------------------------------------------------------------------------

    def plan(self, cut: Partition, hidden_std: float = 0.0, gradient_std: float = 0.0, **more: Any) -> FederationPlan:
        """One client's plan at a cut, with the papers' noise."""
        noised = hidden_std > 0 or gradient_std > 0
        noise = {"trust": {"mode": "noised"}, "noise": {"hidden_std": hidden_std, "gradient_std": gradient_std}}
        return parse_plan(
            {
                "model": {"path": self.model},
                "partition": {"input_blocks": cut.input_blocks, "output_blocks": cut.output_blocks},
                "data": {"loss_on": "all", "max_tokens": max(2, self.sizes.tokens)},
                "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
                "training": {"steps_per_round": self.sizes.steps, "micro_batch_sequences": self.sizes.batch},
                "clients": [{"name": "a"}],
                **(noise if noised else {}),
                **more,
            }
        )

    def attacker(self, plan: FederationPlan) -> Attacker:
        """Who knows the public weights and the plan, and nothing of what the client trained."""
        std = {channel: plan.noise.std(channel) for channel in (Channel.HIDDEN, Channel.GRADIENT)}
        base = BaseModel(self.checkpoint, plan.partition_of("a"))
        return Attacker(
            base,
            plan,
            std,
            beginning=self.beginning,
            public=self.public,
            beam=self.sizes.beam,
            budget_s=self.sizes.inverter_s,
        )

    def targets(self) -> list[Target]:
        """The texts under attack, with nothing observed yet."""
        begins = len(self.beginning)
        return [
            Target("", ids_T, torch.cat([ids_T[1:], torch.tensor([IGNORE])]), begins=begins) for ids_T in self.attacked
        ]

    def scales(self, cut: Partition) -> tuple[float, float]:
        """Root mean square of a hidden state's and of a gradient's values: the noise of rho = 1."""
        found = []
        targets = self.targets()
        Tap(self.plan(cut), self.checkpoint).observe(targets)
        for values in ("hidden_TH", "gradient_TH"):
            rows_TH = torch.cat([getattr(target.observations[0], values)[1:-1] for target in targets])
            found.append(float(rows_TH.norm(dim=1).mean()) / rows_TH.shape[1] ** 0.5)
        return found[0], found[1]

    def trained(self, plan: FederationPlan) -> SplitRun:
        """A client and its server after a training under the plan's noise."""
        split = SplitRun(plan, self.checkpoint)
        split.train(batches_of(self.public, self.sizes.batch, self.sizes.steps, seed=1))
        return split

    def observe(self, plan: FederationPlan, split: SplitRun | None = None, epochs: int = 1) -> list[Target]:
        """What the server sees of the texts under attack."""
        tap = Tap(plan, self.checkpoint, parameters=None if split is None else split.segments.parameters())
        if split is not None:
            tap.trunk = split.trunk
        targets = self.targets()
        tap.observe(targets, epochs)
        return targets

    # --- figures ------------------------------------------------------------------------------------------------------

    def figure(self, targets: Sequence[Target], *draws: Sequence[Recovered]) -> dict[str, Any]:
        """Recovery with its interval, and what is left of it beyond the prior.

        Args:
            targets: The texts.
            draws: An attack's answers, for each draw of the noise. A text's draws count as one text of their length,
                so that the interval is over texts.
        """
        if not self._guesses:
            attacker = self.attacker(self.plan(Partition(0, 0)))
            self._guesses = [attacker.expected(ids_T).argmax(1) for ids_T in self.attacked]
        guesses, answers = self._guesses, list(draws[0])
        if len(draws) > 1:
            guesses = [guess.repeat(len(draws)) for guess in guesses]
            answers = [_joined(target, together) for target, *together in zip(targets, *draws, strict=True)]
            targets = [replace(target, ids_T=target.ids_T.repeat(len(draws))) for target in targets]
        found: Score = score(targets, answers, guesses, lambda _: "")
        recovery, excess = found.recovery, found.excess
        return {
            "recovery": recovery.value,
            "interval": [recovery.low, recovery.high],
            "excess": excess.value,
            "excess_interval": [excess.low, excess.high],
        }

    def forward(self, plan: FederationPlan, *draws: Sequence[Target]) -> dict[str, Any]:
        """A1 where nothing was added, else A2; of one draw of the noise or the mean of several."""
        attacker = self.attacker(plan)
        module = a2_likelihood if plan.noise.hidden_std else a1_nearest
        answers = [module.run(attacker, targets) for targets in draws]
        return {"attack": "A2" if plan.noise.hidden_std else "A1"} | self.figure(draws[0], *answers)

    def backward(self, plan: FederationPlan, targets: Sequence[Target]) -> dict[str, Any]:
        """A5, joint with A2 where both channels are noised."""
        return {"attack": "A5"} | self.figure(targets, a5_labels.run(self.attacker(plan), targets))

    def inverter(self, plan: FederationPlan, targets: Sequence[Target]) -> dict[str, Any]:
        """A3."""
        answers = a3_inverter.run(self.attacker(plan), targets)
        return {"attack": "A3", "note": answers[0].note} | self.figure(targets, answers)

    def averaged(self, plan: FederationPlan, targets: Sequence[Target]) -> dict[str, Any]:
        """A4."""
        return {"attack": "A4"} | self.figure(targets, a4_averaging.run(self.attacker(plan), targets))

    def prior(self) -> float:
        """Share of the tokens that the public model guesses, given the true ones before each."""
        attacker = self.attacker(self.plan(Partition(0, 0)))
        found: float = self.figure(self.targets(), a0_prior.run(attacker, self.targets()))["recovery"]
        return found

    def without_a_server(self, cut: Partition, steps: int) -> float:
        """Perplexity of a client that joins its own input and output blocks, and trains them without any trunk."""
        sections = {"adapter": {"input": "full", "trunk": "frozen", "output": "adapter"}}
        schedule = {"training": {"steps_per_round": steps, "micro_batch_sequences": self.sizes.batch}}
        plan = self.plan(cut, **sections, **schedule)
        segments = setup.load_segments(plan, self.checkpoint, "a", "cpu")
        for step, batch in enumerate(batches_of(self.public, self.sizes.batch, steps, seed=1)):
            segments.zero_grad()
            segments.train(True)
            hidden_TH = segments.embed(batch, step, 0)
            loss = segments.output_blocks.loss(hidden_TH, batch.lengths, batch.targets_T)
            torch.autograd.backward(loss)
            scale = 1.0 / batch.num_target_tokens
            norm = segments.squared_norm(scale) ** 0.5
            segments.apply(segments.gradients(), step, scale, min(1.0, plan.optimizer.max_norm / (norm + 1e-6)))
        segments.train(False)
        total = tokens = 0.0
        for start in range(0, len(self.held), 16):
            batch = pack(self.held[start : start + 16])
            total += segments.evaluate_head(batch, segments.evaluate_embed(batch))
            tokens += batch.num_target_tokens
        return math.exp(total / tokens)

    def counted(self) -> dict[str, float]:
        """Perplexity of counting words and pairs of public text: what needs no model at all."""
        singles: Counter[int] = Counter(t for ids_T in self.public for t in ids_T.tolist())
        pairs: Counter[tuple[int, int]] = Counter()
        for ids_T in self.public:
            pairs.update(itertools.pairwise(ids_T.tolist()))
        total = sum(singles.values())
        nats = [0.0, 0.0]
        count = 0
        for ids_T in self.held:
            ids = ids_T.tolist()
            for before, token in itertools.pairwise(ids):
                single = (singles[token] + 1) / (total + self.vocab_size)
                pair = (pairs[before, token] + 10 * single) / (singles[before] + 10)
                nats = [nats[0] - math.log(single), nats[1] - math.log(pair)]
                count += 1
        return {"unigrams": math.exp(nats[0] / count), "bigrams": math.exp(nats[1] / count)}


def _joined(target: Target, answers: Sequence[Recovered]) -> Recovered:
    """Several answers for one text end to end; the beginning, which is known, counts in none."""
    scored_T = torch.ones(len(target.ids_T), dtype=torch.bool)
    scored_T[: target.begins] = False
    return Recovered(torch.cat([answer.ids_T for answer in answers]), scored_T=scored_T.repeat(len(answers)))
