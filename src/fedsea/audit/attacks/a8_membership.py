"""A8, membership: whether the trained adapters tell which texts they were trained on.

Half of the canaries are trained on, under the plan's own settings and noise, among public text; the other half, made
in the same way, is not. A text's score is how much more the trained model expects it than the public one does. Who can
try this is whoever gets the adapters: the server, and where they are shared every client.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.membership import Membership, membership
from fedsea.audit.targets import Progress, Target, unheard
from fedsea.audit.training import SplitRun, batches_of
from fedsea.audit.verdict import Verdict

_STEPS = 60
_FEWEST = 16
_ROUNDING = 16 * torch.finfo(torch.float32).eps
"""A loss is not known better than to this share of itself."""


@dataclass(frozen=True, slots=True)
class MembershipReport:
    """What the adapters tell.

    Attributes:
        found: None if there is nothing to tell from; `reason` says why.
        epochs: How often each member was trained on, on average.
        adapters: "all": the whole model's; "trunk": the server's own, where the clients' stay at home.
        cut_short: The time was up before so many steps were taken as the plan has.
        reason: Why `found` is None.
    """

    found: Membership | None
    epochs: float
    adapters: str
    cut_short: bool = False
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """PARTIAL above guessing with certainty: that a text was trained on is told, and no text is recovered by it.

        Without that, INCONCLUSIVE if there were too few texts or steps, or too small ones, to see it.
        """
        if self.found is not None and self.found.auc_interval[0] > 0.5:
            return Verdict.PARTIAL
        return Verdict.INCONCLUSIVE if self.found is None or self.cut_short else Verdict.NOT_RECOVERED

    @property
    def sentence(self) -> str:
        """One line."""
        if self.found is None:
            return self.reason + (" Its time was up before the run's steps were." if self.cut_short else "")
        f = self.found
        which = "all adapters" if self.adapters == "all" else "the server's own adapters"
        short = " (its time was up before the run's steps were)" if self.cut_short else ""
        return (
            f"With {which}, after {self.epochs:.1f} epochs{short}, trained texts are told from others with an AUC of "
            f"{f.auc:.3f} ({f.auc_interval[0]:.3f} to {f.auc_interval[1]:.3f}); {f.tpr:.0%} of them at a rate of "
            f"{f.fpr:.1%} false alarms; exposure {f.exposure:.1f} of {f.most_exposure:.1f} bits."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "sentence": self.sentence}


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> MembershipReport:
    """Train with half of the targets, then score them all.

    Args:
        attacker: Its plan says how training goes; its public texts are trained on as well.
        targets: The canaries, all made in the same way: every other one is trained on.
        progress: Told of training steps.
    """
    personal = attacker.plan.aggregation.sync == "personal"
    which = "trunk" if personal and attacker.plan.trains_trunk else "all"
    texts = [target.ids_T.long() for target in targets]
    if len(texts) < _FEWEST:
        return MembershipReport(None, 0.0, which, reason=f"Membership needs {_FEWEST} texts or more.")
    generator = torch.Generator().manual_seed(attacker.seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    members = [texts[i] for i in order[::2]]
    others = [texts[i] for i in order[1::2]]
    background = [ids_T.long() for ids_T in attacker.public][: len(members)]
    plan = attacker.plan
    size = plan.micro_batches_of(plan.client_names[0])[1]
    steps = min(plan.num_steps, _STEPS)
    split = SplitRun(plan, attacker.base.checkpoint, key=attacker.noise_key("A8"))
    own = split.segments.parameters()
    before = [split.losses(part, noised=False) for part in (members, others)]
    until = time.monotonic() + attacker.budget_s
    batches = batches_of(members + background, size, steps, attacker.seed)
    in_time = itertools.takewhile(lambda _: time.monotonic() < until, batches)
    split.train(in_time, told=lambda step: progress(step, steps))
    if which == "trunk":
        split.segments.load_parameters(own)
    after = [split.losses(part, noised=False) for part in (members, others)]
    inside, outside = ([b - a for b, a in zip(*pair, strict=True)] for pair in zip(before, after, strict=True))
    progress(steps, steps)
    epochs = split.step * size / (len(members) + len(background))
    cut_short = split.step < steps
    resolution = _ROUNDING * max(map(abs, before[0] + before[1]))
    if reason := _unusable(inside, outside, resolution):
        return MembershipReport(None, epochs, which, cut_short, reason)
    return MembershipReport(membership(inside, outside, attacker.seed, resolution), epochs, which, cut_short)


def _unusable(members: Sequence[float], others: Sequence[float], resolution: float) -> str:
    """Why nothing can be told from these scores, or nothing."""
    if not all(map(math.isfinite, (*members, *others, resolution))):
        return "Membership: losses are not finite after the training, so nothing can be told from them."
    alike = sum(abs(member - other) <= resolution for member in members for other in others)
    if 2 * alike > len(members) * len(others):
        return (
            f"Membership: in {alike / (len(members) * len(others)):.0%} of the pairs of a trained and another text the "
            "training moved both losses alike, or not at all, up to rounding, so nothing can be told from them."
        )
    return ""
