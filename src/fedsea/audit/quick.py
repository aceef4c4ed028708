"""A few lines about what a server could have read, for the end of a first try; `fedsea audit` is the real thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedsea.audit import curves as drawn
from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks import a1_nearest, a2_likelihood, a5_labels
from fedsea.audit.canaries import Texts
from fedsea.audit.observe import Tap
from fedsea.audit.scoring import Decode, score
from fedsea.audit.settings import AuditOptions, Clock
from fedsea.audit.subject import Subject, variant
from fedsea.audit.targets import OutOfTime, Progress, Recovered, Target
from fedsea.data.tokenizer import load_tokenizer
from fedsea.model.checkpoint import open_checkpoint
from fedsea.plan import FederationPlan
from fedsea.types import Channel

PAPERS_RHO = 0.5
"""Noise norm over hidden norm: about as much as leaves a model of use, and more than the papers' own."""

NO_TIME = "no time"
NO_LOSS = "no token with a loss was found"
"""Why a row is left out."""

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


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A channel under a trust mode of which the table has no row.

    Attributes:
        defence: As in `TableRow`.
        channel: Likewise.
        why: In a few words.
    """

    defence: str
    channel: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class QuickTable:
    """The rows, and what they lack."""

    rows: tuple[TableRow, ...]
    left_out: tuple[LeftOut, ...]


def quick_table(
    plan: FederationPlan,
    model_folder: str | Path,
    texts: Sequence[Path] = (),
    *,
    client: str = "",
    rho: float = PAPERS_RHO,
    seed: int = 0,
    limit_s: float = 30.0,
    now: Callable[[], float] = time.monotonic,
) -> QuickTable:
    """What the server reads at trusted-server, and at the papers' noise on the forward channel.

    Args:
        plan: Cut and codecs are its; its first client's if none is named.
        model_folder: The base model.
        texts: Own files; without any, planted notes are attacked.
        client: Whose cut.
        rho: Noise norm over the hidden states' norm.
        seed: Of notes and noise.
        limit_s: What does not fit is left out, and said to be.
        now: The clock of that limit, in seconds.

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
    clock = Clock(limit_s / 60, lambda *_: None, now)
    clock.start()
    found: list[TableRow | LeftOut] = []
    tap: Tap | None = None
    for words, noise in (("trusted-server", 0.0), (f"Gaussian noise, {rho:g} of the hidden states' norm", std)):
        jobs: list[_Job] = [("hidden", "A2", a2_likelihood.run) if noise else ("hidden", "A1", a1_nearest.run)]
        if plan.sends_gradients(name):
            jobs.append(("gradient", "A5", a5_labels.run))
        if not clock.left_s:
            found += [LeftOut(words, channel, NO_TIME) for channel, _, _ in jobs]
            continue
        under = variant(plan, name, hidden_std=noise)
        sent = drawn.fresh(targets, _TOKENS)
        tap = Tap(under, checkpoint, name, key=options.key("table", noise), beside=tap)
        tap.observe(sent)
        attacker = replace(plain, plan=under, noise_std={Channel.HIDDEN: noise} if noise else {})
        seen = _Seen(words, attacker, sent, drawn.guesses_of(attacker, sent), made.decode, tap.perplexity, seed)
        found += [_attack(seen, job, clock) for job in jobs]
    rows = tuple(one for one in found if isinstance(one, TableRow))
    return QuickTable(rows, tuple(one for one in found if isinstance(one, LeftOut)))


_Job = tuple[str, str, Callable[[Attacker, Sequence[Target], Progress], Sequence[Recovered]]]
"""Channel, attack, and how it is run."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is attacked under one defence."""

    defence: str
    attacker: Attacker
    sent: Sequence[Target]
    guesses: Sequence[torch.Tensor]
    decode: Decode
    perplexity: float
    seed: int


def _attack(seen: _Seen, job: _Job, clock: Clock) -> TableRow | LeftOut:
    channel, attack, attempt = job
    try:
        answers = attempt(seen.attacker, seen.sent, clock.watch(attack))
    except OutOfTime:
        return LeftOut(seen.defence, channel, NO_TIME)
    if all(answer.scored_T is not None and not answer.scored_T.any() for answer in answers):
        return LeftOut(seen.defence, channel, NO_LOSS)
    found = score(seen.sent, answers, seen.guesses, seen.decode, seen.seed)
    named = sum(found.identifiers[kind] * count for kind, count in found.num_identifiers.items())
    identifiers = named / max(1, sum(found.num_identifiers.values()))
    return TableRow(
        seen.defence, channel, attack, found.recovery.value, found.prior.value, identifiers, seen.perplexity
    )
