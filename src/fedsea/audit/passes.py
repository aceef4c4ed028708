"""How many passes over one text a plan makes, and what so many leave of independent noise.

The mean of E releases of the same values under independent noise of standard deviation s has noise of s / sqrt(E). So a
few passes that were really sent, with their noise made smaller, stand for as many as a training makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fedsea.audit.observe import Tapped, clipped
from fedsea.audit.subject import Subject
from fedsea.audit.targets import Observation
from fedsea.plan import FederationPlan
from fedsea.types import Channel


@dataclass(frozen=True, slots=True)
class Passes:
    """Over one text.

    Attributes:
        sent: By the audit, over the real way.
        attacked: That these stand for.
        of: Where that number comes from, in words.
    """

    sent: int
    attacked: int
    of: str

    @property
    def each(self) -> float:
        """Passes that one of those that were sent stands for."""
        return self.attacked / self.sent

    @property
    def sentence(self) -> str:
        """For the report."""
        sent = f"{self.sent} were sent"
        stand = f", and their noise made smaller as that of {self.attacked} averages out" if self.each > 1 else ""
        return (
            f"A3, A4 and A5 put together {self.attacked} passes over each text ({sent}{stand}): {self.of}. All other "
            "attacks on text look at one."
        )


def passes_of(subject: Subject, epochs: int) -> Passes:
    """Of the plan, or of the run where its client's folder says how often it goes through the silo.

    Args:
        subject: What is audited.
        epochs: Passes that the audit sends itself, at least attacked.
    """
    std = subject.noise_std()
    sent = epochs if std else 1
    if not {Channel.HIDDEN, Channel.GRADIENT} & std.keys():
        return Passes(sent, sent, "without noise on what they look at one tells as much as all")
    made, of = (
        subject.plan.num_updates,
        "one in each step of the plan; a silo with fewer sequences than a step takes makes more",
    )
    if subject.epochs:
        made, of = subject.epochs, "the run goes through its silo no more often"
    return Passes(sent, made, of) if made >= sent else Passes(sent, sent, "the audit never takes fewer")


def as_mean(observation: Observation, tapped: list[Tapped], plan: FederationPlan, passes: float) -> Observation:
    """One pass with the noise that the mean of several has; channels without noise stay as they are.

    Args:
        observation: As it was sent.
        tapped: [hidden states, gradients if any] as `Tap.send` gives them.
        plan: Its noise and clips.
        passes: How many.
    """
    noise = plan.noise
    hidden_TH, gradient_TH = observation.hidden_TH, observation.gradient_TH
    if noised := (plan.trust.mode == "noised" and noise.std(Channel.HIDDEN) > 0):
        hidden_TH = _shrunk(hidden_TH, clipped(tapped[0], Channel.HIDDEN, noise), passes)
    observation = replace(observation, hidden_TH=hidden_TH, hidden_passes=passes if noised else 1.0)
    if gradient_TH is None or plan.trust.mode != "noised" or not noise.std(Channel.GRADIENT):
        return observation
    gradient_TH = _shrunk(gradient_TH, clipped(tapped[1], Channel.GRADIENT, noise), passes)
    return replace(observation, gradient_TH=gradient_TH, gradient_passes=passes)


def _shrunk(seen_TH: torch.Tensor, clipped_TH: torch.Tensor, passes: float) -> torch.Tensor:
    return clipped_TH + (seen_TH.float() - clipped_TH) / math.sqrt(passes)
