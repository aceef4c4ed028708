"""What a report says beside its figures: what was audited, examples, and sentences that a reader has to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedsea.audit import curves as drawn
from fedsea.audit.attacker import Attacker
from fedsea.audit.canaries import Texts
from fedsea.audit.outcome import Outcome
from fedsea.audit.passes import Passes, passes_of
from fedsea.audit.sessions import Use
from fedsea.audit.settings import AuditOptions
from fedsea.audit.subject import Subject
from fedsea.audit.targets import Target, chosen
from fedsea.audit.verdict import Verdict
from fedsea.plan import backward_channel
from fedsea.types import Channel

_READ = (Verdict.PARTIAL, Verdict.EXPOSED)

_EXAMPLES = 4

_PUBLIC = "public weights"
_SENT = "public weights and the adapters that were sent to the server"
_SUMMED = "public weights and the mean of the clients' adapters, which secure aggregation leaves the server"


def about(
    subject: Subject, options: AuditOptions, attacker: Attacker, targets: Sequence[Target], used: Sequence[Use]
) -> dict[str, Any]:
    """Plan, model, seed and scale, as plain values.

    Args:
        subject: What is audited.
        options: How.
        attacker: With the public model.
        targets: What was sent in training.
        used: What was asked in use.
    """
    plan, cut = subject.plan, subject.partition
    passes = passes_of(subject, options.scale.epochs)
    return {
        "plan": plan.name,
        "plan_sha256": (subject.agreed or plan).sha256(),
        "own_noise": subject.stricter,
        "noise_from": subject.noise_from,
        "client": subject.name,
        "trained": subject.parameters is not None,
        "trained_trunk": subject.trunk is not None,
        "audited": subject.states,
        "attacker_model": _attacker_model(subject),
        "trust_mode": plan.trust.mode,
        "noise_std": {channel.value: std for channel, std in subject.noise_std().items()},
        "codecs": {channel.value: codec for channel, codec in attacker.codecs.items()},
        "secure_aggregation": "rounds played: masks and sums looked at" if plan.aggregation.secure else "off",
        "backward_channel": backward_channel(plan, subject.name),
        "k": cut.input_blocks,
        "m": cut.output_blocks,
        "blocks": subject.checkpoint.num_blocks,
        "hidden_size": subject.checkpoint.hidden_size,
        "vocab_size": attacker.vocab_size,
        "scale": "quick" if options.quick else "full",
        "seed": options.seed,
        "sequences": len(targets),
        "passes": passes.attacked,
        "passes_sent": passes.sent,
        "sessions": len(used),
        "tokens": sum(len(target.ids_T) - target.begins for target in targets),
        "own_texts": bool(options.texts),
        "rho": _rho(subject, attacker, targets),
    }


def _attacker_model(subject: Subject) -> str:
    if not subject.sent:
        return _PUBLIC
    return _SUMMED if subject.plan.aggregation.secure else _SENT


def _rho(subject: Subject, attacker: Attacker, targets: Sequence[Target]) -> float:
    """The plan's noise on hidden states as a share of their norm."""
    std = subject.noise_std().get(Channel.HIDDEN, 0.0)
    if not std:
        return 0.0
    return round(std * math.sqrt(subject.checkpoint.hidden_size) / drawn.norm_of(attacker, targets), 4)


def notes(subject: Subject, outcomes: Sequence[Outcome], passes: Passes | None = None) -> tuple[str, ...]:
    """Sentences about what was audited that a reader of the verdict has to know.

    Args:
        subject: What is audited.
        outcomes: What became of the attacks.
        passes: Over each text; None: not said.
    """
    said = []
    if stricter := subject.stricter:
        listed = ", ".join(f"{key} = {value:g}" for key, value in stricter.items())
        said.append(f"Audited with this client's own noise, stricter than the plan's: {listed}.")
    if subject.noise_std():
        said.append(f"The noise that was audited is {subject.noise_from}.")
    if passes is not None and _averages_out(subject):
        said.append(passes.sentence)
    if subject.pseudonyms:
        said.append(
            "This client replaces identifiers by pseudonyms before it tokenises; the texts of this audit were not "
            "replaced, so of what is recognised the surrogates come back, not the originals."
        )
    if not subject.plan.inference.enabled:
        said.append(
            "This plan allows no inference (inference.enabled = false): prompts and answers do not leave under it, and "
            "the verdict is about training alone."
        )
    if subject.noise_std() and any(o.attack.id == "A10" and o.verdict in _READ for o in outcomes):
        said.append(
            "Answers are chosen from what the server itself computes, so no noise on what is sent hides them (A10). A "
            "federation that only trains says so in its plan, with inference.enabled = false; its training alone is "
            "then judged."
        )
    return tuple(said)


def _averages_out(subject: Subject) -> bool:
    return any(channel in subject.noise_std() for channel in (Channel.HIDDEN, Channel.GRADIENT))


def examples(targets: Sequence[Target], outcomes: Sequence[Outcome], texts: Texts) -> tuple[dict[str, Any], ...]:
    """Original and best reconstruction, token by token, of some sequences of each channel of training."""
    made: list[dict[str, Any]] = []
    for channel in (Channel.HIDDEN, Channel.GRADIENT):
        ours = [o for o in outcomes if o.attack.channel is channel and o.attack.id != "A0" and not o.in_use]
        done = [o for o in ours if o.score is not None]
        if not done:
            continue
        best = max(done, key=lambda o: o.score.recovery.value if o.score else 0.0)
        for place in chosen(targets, _EXAMPLES):
            target, answer = targets[place], best.answers[place]
            said, truth = answer.ids_T.tolist(), target.ids_T.tolist()
            pieces = [
                {"text": texts.decode([token]) or "·", "right": token == truth[i]}
                for i, token in enumerate(said)
                if i >= target.begins
            ]
            made.append({"channel": channel.value, "attack": best.attack.id, "original": target.text, "pieces": pieces})
    return tuple(made)
