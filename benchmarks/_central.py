"""Central training of the same model with transformers and peft: the floor that split training is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedsea.client import setup
from fedsea.data.opening import open_silo
from fedsea.data.tokenizer import load_tokenizer
from fedsea.model.head import summed_cross_entropy
from fedsea.plan import load_plan
from fedsea.types import IGNORE, TokenBatch

_NUM_BATCHES = 64


class Central:
    """A plain loop: whole model, LoRA by peft, sdpa attention, transformers' own loss, AdamW, clipping.

    Batches are the very ones of the split run's client, tokenised before the clock starts. Sequences of one length
    run without a mask; unequal ones are padded on the right, as transformers' collators do.

    Args:
        plan_file: The split run's plan.
        data: The client's silo.
        name: The client.
        threads: CPU threads.
    """

    def __init__(self, plan_file: Path, data: Path, name: str, threads: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.plan = plan = load_plan(plan_file)
        tokenizer = load_tokenizer(plan.model.path, vocab_size=None)
        silo = open_silo([data], tokenizer, plan.data, seed=plan.seed)
        stream = setup.open_stream(plan, silo, name)
        self._batches = [_arguments(stream.next()) for _ in range(_NUM_BATCHES)]
        self._next = 0
        base = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, attn_implementation="sdpa")
        lora = LoraConfig(r=plan.adapter.rank, lora_alpha=plan.adapter.alpha, target_modules="all-linear")
        self._model = get_peft_model(base, lora).train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        settings = plan.optimizer
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=all(parameter.device.type == "cpu" for parameter in self._trained),
        )
        self._micro_batches, _ = plan.micro_batches_of(name)

    def steps(self, count: int) -> tuple[list[float], int]:
        """Optimizer steps.

        Returns:
            Mean loss of each step, and tokens without padding.
        """
        losses, num_tokens = [], 0
        for _ in range(count):
            batches = [self._batches[(self._next + i) % _NUM_BATCHES] for i in range(self._micro_batches)]
            self._next += self._micro_batches
            targets = sum(number for _, number, _ in batches)
            total = 0.0
            for arguments, _, tokens in batches:
                # With `num_items_in_batch` transformers sums over tokens and divides by the whole step's.
                loss = self._model(**arguments, num_items_in_batch=targets, use_cache=False).loss
                loss.backward()
                total += float(loss.detach())
                num_tokens += tokens
            torch.nn.utils.clip_grad_norm_(self._trained, self.plan.optimizer.max_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
            losses.append(total)
        return losses, num_tokens

    def heads(self, repeats: int) -> dict[str, float]:
        """CPU seconds of head and loss, forward and backward, on one batch: transformers' way and fedsea's in turns."""
        model = self._model.get_base_model()
        arguments, targets, _ = self._batches[0]
        labels_BL = arguments["labels"]
        shape, vocab_size = (*labels_BL.shape, model.config.hidden_size), model.config.vocab_size
        hidden_BLH = torch.randn(shape, generator=torch.Generator().manual_seed(0))

        def transformers(hidden_BLH: torch.Tensor) -> torch.Tensor:
            logits = model.lm_head(hidden_BLH)
            loss: torch.Tensor = model.loss_function(logits, labels_BL, vocab_size, num_items_in_batch=targets)
            return loss

        def fedsea(hidden_BLH: torch.Tensor) -> torch.Tensor:
            targets_T = torch.nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE).flatten()
            rows = targets_T != IGNORE
            hidden_TH = hidden_BLH.flatten(0, 1)[rows]
            return summed_cross_entropy(model.lm_head, [], hidden_TH, targets_T[rows], vocab_size)

        seconds: dict[str, list[float]] = {"transformers": [], "fedsea": []}
        for _ in range(repeats):
            for name, loss_of in (("transformers", transformers), ("fedsea", fedsea)):
                seconds[name].append(_cpu_seconds(loss_of, hidden_BLH))
        return {name: statistics.median(values) for name, values in seconds.items()}


def _cpu_seconds(loss_of: Callable[[torch.Tensor], torch.Tensor], hidden_BLH: torch.Tensor) -> float:
    start = time.process_time()
    loss_of(hidden_BLH.clone().requires_grad_()).backward()
    return time.process_time() - start


def _arguments(batch: TokenBatch) -> tuple[dict[str, Any], int, int]:
    """Arguments of transformers' model, target tokens, tokens."""
    longest = max(batch.lengths)
    rows = zip(
        torch.split(batch.input_ids_T, list(batch.lengths)),
        torch.split(batch.targets_T, list(batch.lengths)),
        strict=True,
    )
    ids, labels, mask = [], [], []
    for ids_L, targets_L in rows:
        padding = longest - len(ids_L)
        # transformers shifts by itself: a token's label is the token, wherever the token before it has a target.
        labels_L = torch.cat([torch.tensor([IGNORE]), targets_L[:-1]])
        ids.append(torch.nn.functional.pad(ids_L, (0, padding)))
        labels.append(torch.nn.functional.pad(labels_L, (0, padding), value=IGNORE))
        mask.append(torch.nn.functional.pad(torch.ones_like(ids_L), (0, padding)))
    arguments = {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
    if min(batch.lengths) < longest:
        arguments["attention_mask"] = torch.stack(mask)
    return arguments, batch.num_target_tokens, batch.num_tokens
