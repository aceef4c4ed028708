"""Texts of a client, what a server sees of them under a plan, and an attacker who knows the plan."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedsea.audit.attacker import Attacker, BaseModel
from fedsea.audit.observe import Tap
from fedsea.audit.targets import Recovered, Target
from fedsea.model.checkpoint import open_checkpoint
from fedsea.plan import FederationPlan, parse_plan
from fedsea.types import IGNORE, Channel, Partition
from tests.support.assets import WORDS

BEGIN = 1


def plan_of(folder: Path, k: int = 1, m: int = 1, **sections: Any) -> FederationPlan:
    values: dict[str, Any] = {
        "model": {"path": str(folder)},
        "partition": {"input_blocks": k, "output_blocks": m},
        "data": {"loss_on": "all"},
        "clients": [{"name": "a"}],
    }
    return parse_plan(values | sections)


def noised(**noise: Any) -> dict[str, Any]:
    return {"trust": {"mode": "noised"}, "noise": noise}


def texts(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Words as bytes in the vocabulary of `make_tokenizer`, behind the token that begins every text."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = " ".join(draw.choices(WORDS, k=length)).encode()[: length - 1]
        found.append(torch.tensor([BEGIN, *(4 + byte for byte in words)]))
    return found


def targets_of(ids: Sequence[torch.Tensor], prompt: int = 0) -> list[Target]:
    """With loss everywhere behind the prompt."""
    found = []
    for ids_T in ids:
        targets_T = torch.cat([ids_T[1:], torch.tensor([IGNORE])])
        targets_T[:prompt] = IGNORE
        found.append(Target("", ids_T, targets_T, begins=1))
    return found


@functools.cache
def _base(folder: str, partition: Partition) -> BaseModel:
    """Of several tests' attackers, none of whom trains it."""
    return BaseModel(open_checkpoint(folder), partition)


def attacker_of(plan: FederationPlan, **more: Any) -> Attacker:
    std = {channel: plan.noise.std(channel) for channel in (Channel.HIDDEN, Channel.GRADIENT)}
    codecs = {Channel.HIDDEN: plan.wire.hidden, Channel.GRADIENT: plan.wire.gradient}
    base = _base(plan.model.path, plan.partition_of("a"))
    return Attacker(base, plan, std, codecs, (BEGIN,), **more)


@functools.cache
def _tap(folder: str, partition: Partition, adapter: str) -> Tap:
    """Whose models the taps of several tests use; they train none of them."""
    plan = plan_of(Path(folder), partition.input_blocks, partition.output_blocks, adapter=json.loads(adapter))
    return Tap(plan, open_checkpoint(folder))


def observed(plan: FederationPlan, targets: list[Target], epochs: int = 1, **tap: Any) -> list[Target]:
    if "parameters" not in tap:
        adapter = plan.adapter.model_dump_json(exclude_defaults=True)
        tap["beside"] = _tap(plan.model.path, plan.partition_of("a"), adapter)
    Tap(plan, open_checkpoint(plan.model.path), **tap).observe(targets, epochs)
    return targets


def recovery(targets: Sequence[Target], answers: Sequence[Recovered]) -> float:
    """Share of the scored tokens that are right."""
    right = total = 0
    for target, answer in zip(targets, answers, strict=True):
        scored_T = torch.ones_like(target.ids_T, dtype=torch.bool) if answer.scored_T is None else answer.scored_T
        scored_T = scored_T.clone()
        scored_T[: target.begins] = False
        right += int(((answer.ids_T == target.ids_T) & scored_T).sum())
        total += int(scored_T.sum())
    return right / total
