"""A small audit of the shipped model: its texts, its taps and the attacker."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsea
from fedsea.audit import observe as observing
from fedsea.audit import run as auditing
from fedsea.audit import settings
from fedsea.audit.attacker import Attacker, BaseModel
from fedsea.audit.canaries import Texts
from fedsea.audit.curves import attacker_of, fresh, guesses_of, norm_of
from fedsea.audit.observe import Change, Tap, Tapped
from fedsea.audit.scoring import Score, score
from fedsea.audit.settings import AuditOptions, Scale
from fedsea.audit.subject import Subject, open_subject, variant
from fedsea.audit.targets import Target
from fedsea.model.checkpoint import Checkpoint
from fedsea.plan import FederationPlan
from fedsea.types import Channel, Partition

PLAN = Path(fedsea.__file__).parent / "assets" / "plan.toml"
SILO = Path(fedsea.__file__).parent / "assets" / "silos" / "bank.jsonl"

CUT = Partition(1, 1)
TINY = Scale(3, 2, 20, 2, 2, 3, 4, (0.0, 2.0), 0, 12, 5.0, 1)
"""So small that an audit takes a second or two; without curves."""
ONE_TEXT = replace(TINY, canaries=1, tokens=16, sessions=1)
"""Where one text that comes back, or does not, tells as much as several."""


@dataclass
class Audited:
    """Some texts of the bank's silo as one cut shows them to the server."""

    attacker: Attacker
    targets: list[Target]
    texts: Texts
    taps: list[list[Tapped]]

    def score(self, module: Any, targets: Sequence[Target] | None = None) -> Score:
        """Run an attack and score it, against other truths if some are given."""
        truths = self.targets if targets is None else targets
        answers = module.run(self.attacker, self.targets)
        return score(truths, answers, guesses_of(self.attacker, truths), self.texts.decode)


def noised_plan(folder: Path, hidden_std: float = 2.0, gradient_std: float = 0.01, extra: str = "") -> Path:
    """A plan file of the shipped model with noise, without a clip."""
    text = PLAN.read_text().replace('path = "model"', f'path = "{PLAN.parent / "model"}"')
    noise = f"hidden_std = {hidden_std}\ngradient_std = {gradient_std}\n{extra}"
    file = folder / "plan.toml"
    file.write_text(text.replace("[adapter]", f'[trust]\nmode = "noised"\n\n[noise]\n{noise}\n[adapter]', 1))
    return file


_LOADED: dict[Any, Any] = {}
_models, _load = observing._models, BaseModel._load


def tiny_audits(patch: pytest.MonkeyPatch, scale: Scale = TINY) -> None:
    """Quick audits of so little text, which is enough for their own check too, and of models that are loaded once.

    An audit trains neither the models that it taps nor the public one.
    """

    def models(plan: FederationPlan, checkpoint: Checkpoint, name: str, *more: Any) -> Any:
        key = ("tap", plan.model_dump_json(exclude={"trust", "noise", "wire"}), checkpoint.folder, name)
        if more != (None, None, "cpu"):  # with what was trained
            return _models(plan, checkpoint, name, *more)
        if key not in _LOADED:
            _LOADED[key] = _models(plan, checkpoint, name, *more)
        return _LOADED[key]

    def load(base: BaseModel, loader: Any, where: Any) -> Any:
        if type(base) is not BaseModel:  # one that has what was sent puts it into the model
            return _load(base, loader, where)
        key = ("base", loader, where, base.checkpoint.folder, base.device)
        if key not in _LOADED:
            _LOADED[key] = _load(base, loader, where)
        return _LOADED[key]

    patch.setattr(observing, "_models", models)
    patch.setattr(BaseModel, "_load", load)
    patch.setattr(auditing, "_SELF_CHECK_SEQUENCES", 1)
    patch.setattr(auditing, "_SELF_CHECK_TOKENS", 12)
    patch.setattr(settings, "QUICK", scale)


def subject_of(plan: Path = PLAN) -> Subject:
    return open_subject(plan)


@functools.cache
def loaded(partition: Partition) -> tuple[BaseModel, Tap]:
    """The shipped model at a cut, for attackers and taps of several tests: neither trains it."""
    subject = subject_of()
    plan = variant(subject.plan, subject.name, partition=partition)
    return BaseModel(subject.checkpoint, partition), Tap(plan, subject.checkpoint, subject.name)


def observe(
    partition: Partition = CUT,
    *,
    rho: float = 0.0,
    epochs: int = 1,
    count: int = 4,
    tokens: int = 32,
    clip: float = 0.0,
    unit: str = "sequence",
    change: Change | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    known: int = 0,
    silo: Path = SILO,
) -> Audited:
    """Texts of the silo over the wire, with noise of so many times the hidden states' norm."""
    subject = subject_of()
    options = AuditOptions(PLAN, seed=0)
    texts = Texts(subject.tokenizer, subject.plan, tokens)
    targets = texts.of_files([silo], count)
    base, beside = loaded(partition)
    plain = replace(attacker_of(subject, partition, {}, texts, options), base=base)
    std = rho * norm_of(plain, targets) / subject.checkpoint.hidden_size**0.5
    plan = variant(subject.plan, subject.name, partition=partition, hidden_std=std)
    if clip:
        plan = plan.model_copy(update={"noise": plan.noise.model_copy(update={"hidden_clip": clip, "unit": unit})})
    models = {"parameters": parameters} if parameters is not None else {"beside": beside}
    tap = Tap(plan, subject.checkpoint, subject.name, key=options.key("test"), change=change, **models)
    attacker = replace(plain, plan=plan, noise_std={Channel.HIDDEN: std} if std else {}, beam=4)
    taps = tap.observe(targets, epochs)
    if known:
        attacker.known = fresh(texts.of_files([silo], count + known)[count:], tokens)
        tap.observe(attacker.known)
    return Audited(attacker, targets, texts, taps)
