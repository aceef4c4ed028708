"""Which attacks have something to look at under a plan."""

from __future__ import annotations

from fedsea.audit.catalogue import Attack
from fedsea.audit.subject import Subject
from fedsea.plan import open_channels
from fedsea.types import Channel


def inapplicable(subject: Subject, attack: Attack) -> str:
    """Why an attack has nothing to look at; "" if it has."""
    plan, name = subject.plan, subject.name
    if attack.channel is Channel.GRADIENT and not plan.sends_gradients(name):
        return "the backward channel is closed: this plan sends no gradients"
    leaves = Channel.UPDATE in open_channels(plan, name)
    if attack.id == "A7" and not leaves:
        return "no update of the client's own segments leaves it"
    if attack.id == "A8" and not leaves and not plan.trains_trunk:
        return "no adapter that was trained on the client's text leaves it"
    if attack.id == "A9" and not _claims(subject):
        return "no channel is both clipped and noised, so there is no claim of the noise that could be tested"
    if attack.id == "A4" and Channel.HIDDEN not in subject.noise_std():
        return "hidden states leave without noise, so there is nothing to average out"
    return ""


def _claims(subject: Subject) -> bool:
    """Whether the plan's noise on a channel is one of which something could be claimed."""
    plan = subject.plan
    return plan.trust.mode == "noised" and any(plan.noise.clip(c) and plan.noise.std(c) for c in Channel)
