"""A9, a test of the mechanism: does the real boundary add as much noise, behind as tight a clip, as its claim needs?

It shows that a claim is wrong; that one is right it cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.mechanism import Mechanism, MechanismBound, bound_mechanism
from fedsea.audit.targets import Progress, Target, unheard
from fedsea.audit.verdict import Verdict
from fedsea.plan import FederationPlan
from fedsea.privacy.accountant import charge_of, epsilon_of
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel, Origin, Purpose

_WIDTH = 8
"""Columns of the inputs: the boundary takes any width, and what is tested does not depend on it."""

_TRIALS = 50_000
_UPDATE_TRIALS = 2_500
"""Each is a call of its own, since an update is clipped as a whole."""

_PARAMETER = "parameter"

_ROWS = 4
"""Rows of a sequence, so that a clip of each row, where the sequence should be clipped, shows."""


@dataclass(frozen=True, slots=True)
class ChannelTest:
    """One channel's mechanism against its claim for a single release.

    Attributes:
        claimed_epsilon: At the bound's delta.
        claimed_mu: As Gaussian mu.
        bound: What the releases prove.
    """

    channel: Channel
    claimed_epsilon: float
    claimed_mu: float
    bound: MechanismBound

    @property
    def holds(self) -> bool:
        """Whether nothing was found against the claim."""
        return self.bound.mu <= self.claimed_mu and self.bound.epsilon <= self.claimed_epsilon


@dataclass(frozen=True, slots=True)
class MechanismReport:
    """All channels of a plan on which something is clipped and noised."""

    tests: tuple[ChannelTest, ...]

    @property
    def verdict(self) -> Verdict:
        """A claim that is refuted is a defence that is not there; without a claim there is nothing to test."""
        return Verdict.NOT_RECOVERED if all(test.holds for test in self.tests) else Verdict.EXPOSED

    @property
    def sentence(self) -> str:
        """One line."""
        if not self.tests:
            return "No channel is both clipped and noised, so no claim is made that could be tested."
        parts = []
        for test in self.tests:
            bound = test.bound
            relation = "under" if test.holds else "OVER"
            parts.append(
                f"{test.channel}: epsilon >= {bound.epsilon:.2f} and mu >= {bound.mu:.3f} at {bound.confidence:.0%} "
                f"confidence, {relation} the claim of {test.claimed_epsilon:.2f} and {test.claimed_mu:.3f}"
            )
        return "One release, " + "; ".join(parts) + "."

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tests = [{**asdict(test), "channel": str(test.channel), "holds": test.holds} for test in self.tests]
        return {"tests": tests, "sentence": self.sentence}


def mechanism_of(boundary: Boundary, channel: Channel) -> Mechanism:
    """What a boundary makes of hidden states, gradients, or updates of one parameter each, as a function."""
    if channel is Channel.UPDATE:
        return lambda rows_TH, lengths: torch.cat(
            [_updated(boundary, part) for part in torch.split(rows_TH, list(lengths))]
        )
    make = boundary.hidden if channel is Channel.HIDDEN else boundary.gradient

    def mechanism(rows_TH: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        return make(rows_TH, Origin(Purpose.TRAINING, lengths)).take()[""]

    return mechanism


def _updated(boundary: Boundary, values: torch.Tensor) -> torch.Tensor:
    return boundary.update({_PARAMETER: values}).take()[_PARAMETER]


def hold_against_claim(
    plan: FederationPlan, channel: Channel, mechanism: Mechanism, num_trials: int = _TRIALS, seed: int = 0
) -> ChannelTest:
    """Test a mechanism against what the plan's settings claim of one release on a channel."""
    noise = plan.noise
    clip = noise.clip(channel)
    mu = charge_of(clip, noise.std(channel)) ** 0.5
    rows = 1 if noise.unit == "token" and channel is not Channel.UPDATE else _ROWS  # an update is clipped as a whole
    bound = bound_mechanism(
        mechanism, clip=clip, width=_WIDTH, delta=noise.delta, rows=rows, num_trials=num_trials, seed=seed
    )
    return ChannelTest(channel, epsilon_of(mu, noise.delta), mu, bound)


def run(
    attacker: Attacker,
    targets: Sequence[Target],  # noqa: ARG001 (the inputs are made here: neighbours as far apart as may be)
    progress: Progress = unheard,
    boundary: Boundary | None = None,
) -> MechanismReport:
    """Test each channel of the plan that is clipped and noised.

    Args:
        attacker: Its plan is tested.
        targets: Not read.
        progress: Told of each channel.
        boundary: What is tested; None: the plan's own, which charges nothing, since nothing leaves.
    """
    plan = attacker.plan
    tested = boundary or Boundary.of(plan, key=attacker.noise_key("A9"))
    channels = [c for c in Channel if plan.noise.clip(c) and plan.noise.std(c)]
    tests = []
    for number, channel in enumerate(channels):
        progress(number, len(channels))
        trials = _UPDATE_TRIALS if channel is Channel.UPDATE else _TRIALS
        tests.append(hold_against_claim(plan, channel, mechanism_of(tested, channel), trials, attacker.seed))
    progress(len(channels), len(channels))
    return MechanismReport(tuple(tests))
