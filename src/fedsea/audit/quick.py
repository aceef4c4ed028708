"""A few lines about what a server could have read, for the end of a first try; `fedsea audit` is the real thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedsea.audit import curves as drawn
from fedsea.audit.attacks import a1_nearest, a2_likelihood, a5_labels
from fedsea.audit.canaries import Texts
from fedsea.audit.observe import Tap
from fedsea.audit.scoring import score
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import Subject, variant
from fedsea.audit.targets import OutOfTime
from fedsea.data.tokenizer import load_tokenizer
from fedsea.model.checkpoint import open_checkpoint
from fedsea.plan import FederationPlan
from fedsea.types import Channel

PAPERS_RHO = 0.5
"""Noise norm over hidden norm: about as much as leaves a model of use, and more than the papers' own."""

_SEQUENCES = 4
_TOKENS = 48


@dataclass(frozen=True, slots=True)
class TableRow:
    """One channel under one trust mode.

    Attributes:
        defence: In words.
        channel: "hidden" or "gradient".
        attack: Which one.
        recovery: Share of tokens that are right.
        prior: Share that the public model guesses.
        identifiers: Share of the planted identifiers, of all types together.
        perplexity: Of the model with this defence, on the attacked texts; 0 if none of their tokens takes loss.
    """

    defence: str
    channel: str
    attack: str
    recovery: float
    prior: float
    identifiers: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def quick_table(
    plan: FederationPlan,
    model_folder: str | Path,
    texts: Sequence[Path] = (),
    *,
    client: str = "",
    rho: float = PAPERS_RHO,
    seed: int = 0,
    limit_s: float = 30.0,
) -> list[TableRow]:
    """What the server reads at trusted-server, and at the papers' noise on the forward channel.

    Args:
        plan: Cut and codecs are its; its first client's if none is named.
        model_folder: The base model.
        texts: Own files; without any, planted notes are attacked.
        client: Whose cut.
        rho: Noise norm over the hidden states' norm.
        seed: Of notes and noise.
        limit_s: What does not fit is left out.

    Raises:
        FedseaError: The model or a file cannot be read.
    """
    checkpoint = open_checkpoint(str(model_folder), plan.model.revision)
    tokenizer = load_tokenizer(str(checkpoint.folder), plan.model.revision, vocab_size=None)
    name = client or plan.client_names[0]
    subject = Subject(variant(plan, name), name, checkpoint, tokenizer)
    options = AuditOptions(Path(), seed=seed, quick=True)
    made = Texts(tokenizer, plan, _TOKENS)
    targets = made.of_files(texts, _SEQUENCES) if texts else made.canaries(_SEQUENCES, seed)
    plain = drawn.attacker_of(subject, subject.partition, {}, made, options)
    std = rho * drawn.norm_of(plain, targets) / checkpoint.hidden_size**0.5
    clock = Clock(limit_s / 60, lambda *_: None)
    clock.start()
    rows: list[TableRow] = []
    for words, noise in (("trusted-server", 0.0), (f"Gaussian noise, {rho:g} of the hidden states' norm", std)):
        under = variant(plan, name, hidden_std=noise)
        sent = drawn.fresh(targets, _TOKENS)
        tap = Tap(under, checkpoint, name, key=options.key("table", noise))
        tap.observe(sent)
        attacker = replace(plain, plan=under, noise_std={Channel.HIDDEN: noise} if noise else {})
        guesses = drawn.guesses_of(attacker, sent)
        jobs = [("hidden", "A2", a2_likelihood) if noise else ("hidden", "A1", a1_nearest)]
        if plan.sends_gradients(name):
            jobs.append(("gradient", "A5", a5_labels))
        for channel, attack, module in jobs:
            try:
                answers = module.run(attacker, sent, clock.watch(attack))
            except OutOfTime:
                return rows
            if all(answer.scored_T is not None and not answer.scored_T.any() for answer in answers):
                continue
            found = score(sent, answers, guesses, made.decode, seed)
            named = sum(found.identifiers[kind] * count for kind, count in found.num_identifiers.items())
            rows.append(
                TableRow(
                    words,
                    channel,
                    attack,
                    found.recovery.value,
                    found.prior.value,
                    named / max(1, sum(found.num_identifiers.values())),
                    tap.perplexity,
                )
            )
    return rows
