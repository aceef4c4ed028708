"""Recovery against noise, against the cut, and against what the noise costs; each point is a small audit of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsea.audit.attacker import Attacker, BaseModel
from fedsea.audit.attacks import a1_nearest, a2_likelihood, a5_labels
from fedsea.audit.canaries import Texts
from fedsea.audit.knowing import model_of
from fedsea.audit.observe import Tap
from fedsea.audit.scoring import Score, score
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import Subject, variant
from fedsea.audit.targets import OutOfTime, Progress, Target, unheard, within
from fedsea.plan import FederationPlan
from fedsea.types import IGNORE, Channel, Partition

Point = dict[str, Any]

_MOST_BLOCKS = 3
_OF_CUTS = 0.5
"""Of the curves' time."""


def attacker_of(
    subject: Subject,
    partition: Partition,
    noise_std: dict[Channel, float],
    texts: Texts,
    options: AuditOptions,
    plan: FederationPlan | None = None,
) -> Attacker:
    """The server as an attacker of a cut, with what the plan tells it: the one whose bytes it sees; None: the run's."""
    plan = plan or subject.plan
    wire = plan.wire
    return Attacker(
        BaseModel(subject.checkpoint, partition, options.device),
        plan,
        noise_std,
        {Channel.HIDDEN: wire.hidden, Channel.GRADIENT: wire.gradient},
        texts.beginning,
        beam=options.scale.beam,
        seed=options.seed,
        num_clients=len(subject.plan.client_names),
    )


def tap_of(subject: Subject, plan: FederationPlan, options: AuditOptions, key: bytes, **planted: Any) -> Tap:
    """The client and its server with what they have trained, under a plan that may be another; see `Tap`."""
    own, device = subject.parameters, options.device
    return Tap(plan, subject.checkpoint, subject.name, own, trunk=subject.trunk, key=key, device=device, **planted)


def guesses_of(attacker: Attacker, targets: Sequence[Target]) -> list[torch.Tensor]:
    """The public model's guess at every position, given the true tokens before it."""
    return [attacker.expected(target.ids_T).argmax(dim=1) for target in targets]


def norm_of(attacker: Attacker, targets: Sequence[Target]) -> float:
    """Mean norm of the hidden states at the cut, over rows behind the beginning."""
    rows = [attacker.clean(target.ids_T)[max(1, target.begins) :] for target in targets]
    return float(torch.cat(rows).norm(dim=1).mean())


def fresh(targets: Sequence[Target], tokens: int) -> list[Target]:
    """The same texts, cut to a length, with nothing observed."""
    made = []
    for target in targets:
        aims = target.targets_T[:tokens].clone()
        aims[-1] = target.targets_T[-1] if len(target.ids_T) <= tokens else IGNORE
        secrets = target.secrets if len(target.ids_T) <= tokens else ()
        made.append(
            replace(target, ids_T=target.ids_T[:tokens], targets_T=aims, secrets=secrets, observations=[], means=[])
        )
    return made


def perplexity(
    subject: Subject,
    plain_texts: Sequence[Target],
    options: AuditOptions,
    plan: FederationPlan | None = None,
    progress: Progress = unheard,
    beside: Tap | None = None,
) -> float:
    """Of the model on texts, with a plan's noise and codecs in force.

    Args:
        subject: The client.
        plain_texts: What it is measured on.
        options: For the noise's key.
        plan: None: without any defence.
        progress: Told of texts.
        beside: Whose models are used, see `Tap`.
    """
    plan = plan or variant(subject.plan, subject.name, hidden_std=0.0, plain_wire=True)
    key = options.key("perplexity", plan.sha256())
    tap = tap_of(subject, plan, options, key, beside=beside)
    tap.observe(fresh(plain_texts, options.scale.tokens), progress=progress)
    return tap.perplexity


def noise_curve(
    subject: Subject,
    targets: Sequence[Target],
    plain_texts: Sequence[Target],
    texts: Texts,
    options: AuditOptions,
    progress: Progress,
    points: list[Point],
    beside: Tap | None = None,
) -> None:
    """A2 (A1 without noise) by who has what was sent, and perplexity on plain texts, at rising noise at the plan's cut.

    Args:
        subject: The client.
        targets: What is attacked.
        plain_texts: What perplexity is measured on.
        texts: Made them.
        options: Scale and seed.
        progress: Told of points, and of every position within one.
        points: Added to, so that what is done when the time is up is kept.
        beside: Whose models are used, see `Tap`.
    """
    plain = attacker_of(subject, subject.partition, {}, texts, options)
    base = model_of(subject, options.device)
    targets = fresh(targets, options.scale.curve_tokens)
    width = subject.checkpoint.hidden_size
    norm = norm_of(plain, targets)
    total = len(options.scale.rhos)
    for number, rho in enumerate(options.scale.rhos):
        progress(number, total)
        std = rho * norm / math.sqrt(width)
        plan = variant(subject.plan, subject.name, hidden_std=std)
        sent = fresh(targets, options.scale.curve_tokens)
        tap = tap_of(subject, plan, options, options.key("curve", rho), beside=beside)
        tap.observe(sent)
        cost = perplexity(subject, plain_texts, options, plan, beside=tap)
        beside = tap
        attacker = replace(plain, base=base, plan=plan, noise_std={Channel.HIDDEN: std} if std else {})
        watch = within(progress, number, total)
        answers = (a2_likelihood if std else a1_nearest).run(attacker, sent, watch)
        found = score(sent, answers, guesses_of(plain, sent), texts.decode, options.seed)
        points.append({"rho": rho, "std": round(std, 6), **_point(found), "perplexity": round(cost, 4)})
    progress(total, total)


def cut_curves(
    subject: Subject,
    targets: Sequence[Target],
    texts: Texts,
    options: AuditOptions,
    progress: Progress,
    points: dict[str, list[Point]],
) -> None:
    """Recovery against k (forward, A1 or A2) and against m (backward, A5), with the plan's own noise.

    Args:
        subject: The client.
        targets: What is attacked.
        texts: Made them.
        options: Scale and seed.
        progress: Told of points, and of every position within one.
        points: "k" and "m" to points; added to, so that what is done when the time is up is kept.
    """
    blocks, cut = subject.checkpoint.num_blocks, subject.partition
    ks = range(min(_MOST_BLOCKS + 1, blocks - cut.output_blocks))
    ms = range(min(_MOST_BLOCKS, blocks - cut.input_blocks))
    jobs = [("k", Partition(k, cut.output_blocks)) for k in ks]
    if subject.plan.sends_gradients(subject.name):
        jobs += [("m", Partition(cut.input_blocks, m)) for m in ms]
    std = subject.noise_std()
    for number, (axis, partition) in enumerate(jobs):
        progress(number, len(jobs))
        watch = within(progress, number, len(jobs))
        plan = variant(subject.plan, subject.name, partition=partition)
        sent = fresh(targets, options.scale.curve_tokens)
        Tap(
            plan, subject.checkpoint, subject.name, key=options.key("cut", axis, number), device=options.device
        ).observe(sent)
        attacker = attacker_of(subject, partition, std, texts, options, plan)
        forward = a2_likelihood if Channel.HIDDEN in std else a1_nearest
        answers = (forward if axis == "k" else a5_labels).run(attacker, sent, watch)
        found = score(sent, answers, guesses_of(attacker, sent), texts.decode, options.seed)
        blocks = partition.input_blocks if axis == "k" else partition.output_blocks
        points.setdefault(axis, []).append({axis: blocks, **_point(found)})
    progress(len(jobs), len(jobs))


def _point(found: Score) -> Point:
    return {
        "recovery": round(found.recovery.value, 6),
        "low": round(found.recovery.low, 6),
        "high": round(found.recovery.high, 6),
        "prior": round(found.prior.value, 6),
        "excess": round(found.excess.value, 6),
    }


def curves(
    subject: Subject,
    targets: Sequence[Target],
    plain_texts: Sequence[Target],
    texts: Texts,
    options: AuditOptions,
    clock: Clock,
    beside: Tap | None = None,
) -> tuple[dict[str, list[Point]], str]:
    """All of them, as far as time allows.

    Args:
        subject: The client.
        targets: What is attacked.
        plain_texts: What perplexity is measured on.
        texts: Made them.
        options: Scale and seed.
        clock: The time that is left.
        beside: A tap of the subject, whose models are used where the cut is its own.

    Returns:
        The curves, and a sentence about those that did not fit; "" if all did.
    """
    chosen = list(targets)[: options.scale.curve_sequences]
    found: dict[str, list[Point]] = {}
    missing: list[str] = []
    if not chosen:
        return found, ""
    try:
        cuts = clock.watch("curves of the cut", _OF_CUTS)
        cut_curves(subject, chosen, texts, options, cuts, found)
    except OutOfTime:
        missing.append("cut")
    noise: list[Point] = []
    try:
        watch = clock.watch("curve of noise")
        noise_curve(subject, chosen, plain_texts, texts, options, watch, noise, beside)
    except OutOfTime:
        missing.append("noise")
    if noise:
        found["noise"] = noise
    if not missing:
        return found, ""
    return found, f"The time was up before the curves of {' and '.join(missing)} were whole: give more --minutes."
