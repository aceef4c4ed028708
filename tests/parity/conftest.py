"""Small models of many families, and what transformers itself computes with them.

k  input blocks, m  output blocks, T  tokens of a packed micro-batch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedsea.types import IGNORE

VOCAB = 97
NUM_BLOCKS = 7
LENGTHS = (5, 9, 3, 9, 1)


def make_config(model_type: str, **settings):
    """A tiny config; what a family does not know it ignores."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values.update(settings)
    return AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if value is not None})


def make_model(config) -> PreTrainedModel:
    """Random weights in which no bias and no norm is at its default, so that a lost one shows."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def make_batch(lengths=LENGTHS, seed=0):
    """Ids and targets of a packed micro-batch; a third of the targets carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    targets = torch.cat([torch.cat([part[1:], torch.tensor([IGNORE])]) for part in ids.split(lengths)])
    targets[torch.rand(len(targets), generator=generator) < 0.33] = IGNORE
    return ids, targets, tuple(lengths)


@dataclass
class Central:
    """A whole model: the summed loss over batches, each sequence by itself, and its gradients."""

    model: PreTrainedModel
    folder: Path
    tied: dict[str, str] = field(default_factory=dict)

    def loss_and_gradients(self, batches):
        """Summed loss, and gradient by parameter name."""
        self.model.zero_grad()
        total = torch.zeros(())
        for ids, targets, lengths in batches:
            for part, wanted in zip(ids.split(lengths), targets.split(lengths), strict=True):
                logits = self.model(part[None]).logits[0].float()
                total = total + F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORE)
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def collect(self, *segments):
        """Gradients of segments under the whole model's names; the copies of a tied weight add up."""
        found: dict[str, torch.Tensor] = {}
        for segment in segments:
            for name, parameter in segment.model.named_parameters():
                if parameter.grad is not None:
                    name = self.tied.get(name, name)
                    found[name] = found.get(name, 0) + parameter.grad
        return found


def assert_close(got, expected, what, relative=1e-4):
    """Every gradient within `relative`; gradients that are zero but for rounding are measured by the others."""
    largest = max(gradient.norm() for gradient in expected.values())
    for name in sorted(got.keys() | expected.keys()):
        a, b = got.get(name), expected.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        error, allowed = (a - b).norm(), relative * max(b.norm(), 1e-2 * largest)
        assert error <= allowed, f"{what}: gradient of {name} is off by {error / max(b.norm(), 1e-9):.1e}"


def save(config, folder: Path, **settings) -> Central:
    """Make a model and its checkpoint."""
    model = make_model(config)
    model.save_pretrained(folder, **settings)
    tied = dict(model.get_expanded_tied_weights_keys()) if config.tie_word_embeddings else {}
    return Central(model, folder, tied)


@pytest.fixture(scope="session")
def zoo():
    """The helpers of this file, for tests to use."""
    return __import__("types").SimpleNamespace(
        assert_close=assert_close, config=make_config, batch=make_batch, save=save, num_blocks=NUM_BLOCKS
    )
