"""Central training with transformers, peft and torch alone: what a federation must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, get_scheduler

from fedsea.plan import FederationPlan
from fedsea.types import IGNORE, TokenBatch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def portable(name: str) -> str:
    return name.replace(".default.", ".")


class Central:
    """The whole model with LoRA in every linear layer of its blocks.

    Args:
        folder: Checkpoint.
        plan: For LoRA's and the optimizer's settings.
        initial: Values of the adapters that are trained; the others are left out of the model's training.
    """

    def __init__(self, folder: Path, plan: FederationPlan, initial: dict[str, torch.Tensor]) -> None:
        self.plan = plan
        settings = plan.adapter
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=TARGETS)
        self.model = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(folder))
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if (own := portable(name)) in initial:
                with torch.no_grad():
                    parameter.copy_(initial[own])
                self.parameters[own] = parameter
            else:
                parameter.requires_grad_(False)
        assert self.parameters.keys() == initial.keys()

    def summed_loss(self, batches: Sequence[TokenBatch]) -> torch.Tensor:
        """Every sequence by itself: no packing, no split."""
        total = torch.zeros(())
        for batch in batches:
            parts = zip(batch.input_ids_T.split(batch.lengths), batch.targets_T.split(batch.lengths), strict=True)
            for ids, targets in parts:
                logits = self.model(ids[None]).logits[0]
                total = total + F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
        return total

    def batched_loss(self, batches: Sequence[TokenBatch]) -> torch.Tensor:
        """All sequences in one batch padded on the right, as a central loop takes them; the value of `summed_loss`."""
        ids = [part for batch in batches for part in batch.input_ids_T.split(batch.lengths)]
        targets = [part for batch in batches for part in batch.targets_T.split(batch.lengths)]
        logits = self.model(pad_sequence(ids, batch_first=True)).logits
        wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORE)

    def gradients(self, batches: Sequence[TokenBatch]) -> tuple[float, dict[str, torch.Tensor]]:
        """Summed loss, and its gradients by portable name."""
        self.model.zero_grad()
        loss = self.summed_loss(batches)
        loss.backward()
        found = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        return float(loss.detach()), found

    def trainer(self, names: Sequence[str] | None = None) -> Adam:
        """An optimizer over some of the parameters, all of them by default."""
        return Adam(self.plan, [self.parameters[n] for n in (self.parameters if names is None else names)])

    def values(self) -> dict[str, torch.Tensor]:
        """The adapters, copied."""
        return {n: p.detach().clone() for n, p in self.parameters.items()}


class Adam:
    """torch's AdamW with transformers' schedule."""

    def __init__(self, plan: FederationPlan, parameters: list[nn.Parameter]) -> None:
        s = plan.optimizer
        self.adamw = torch.optim.AdamW(
            parameters, lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
        )
        self._rates = learning_rates(plan)

    def step(self, step: int) -> None:
        """Apply the gradients at the rate of a step of the run."""
        for group in self.adamw.param_groups:
            group["lr"] = self._rates[step]
        self.adamw.step()


def learning_rates(plan: FederationPlan) -> list[float]:
    """transformers' rate at each step of the run."""
    s = plan.optimizer
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=s.learning_rate)
    schedule = get_scheduler(s.schedule, sgd, s.warmup_steps, plan.num_steps)
    rates = []
    for _ in range(plan.num_steps):
        rates.append(schedule.get_last_lr()[0])
        sgd.step()
        schedule.step()
    return rates


def num_targets(batches: Sequence[TokenBatch]) -> int:
    return sum(batch.num_target_tokens for batch in batches)


def train_centrally(central: Central, steps: Sequence[Sequence[TokenBatch]]) -> list[float]:
    """One optimizer step over each list of batches, as if they were one.

    Returns:
        Mean loss before each step.
    """
    adam, losses = central.trainer(), []
    for step, batches in enumerate(steps):
        central.model.zero_grad()
        loss = central.batched_loss(batches) / num_targets(batches)
        loss.backward()
        if central.plan.optimizer.max_norm > 0:
            nn.utils.clip_grad_norm_(list(central.parameters.values()), central.plan.optimizer.max_norm)
        adam.step(step)
        losses.append(float(loss.detach()))
    return losses
