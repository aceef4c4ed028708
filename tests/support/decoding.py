"""Clients that decode in the process of the test, through a server; and what the whole model says to a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea.client import setup
from fedsea.client.decoding import Sequences, SplitDecoder
from fedsea.client.invitation import fetch_invitation
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.results import status
from fedsea.client.retry import RetryPolicy
from fedsea.client.trunk import Standing
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.privacy.boundary import Boundary
from fedsea.wire.identity.identity import Identity
from tests.support.federation import Federation

VOCAB = 97
DEADLINE_S = 60.0
FAMILIES = {"llama": {}, "qwen2": {}, "mistral": {"sliding_window": 6}, "glm4": {}}


def held(fed: Federation) -> tuple[int, int, int]:
    """Sequences, pages and bytes of sessions at the server."""
    found = status(fed.address, fed.identities / "a")["inference"]
    return found["sequences"], found["pages"], found["kv_bytes"]


def comes_back_to(fed: Federation, expected: tuple[int, int, int]) -> bool:
    """Whether the server holds so much again, soon: a goodbye is not answered."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := held(fed)) != expected and time.monotonic() < deadline:
        pass
    return found == expected


def family_checkpoint(folder: Path, family: str, **changes: int) -> Path:
    """A model of a family with random weights, without a tokenizer."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **FAMILIES[family],
        **changes,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@functools.lru_cache(maxsize=8)
def _whole(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def central(folder: Path, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens of the whole model."""
    out = _whole(folder).generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def prompt_of(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Some token ids."""
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextlib.contextmanager
def connected(
    address: str, identity_folder: Path, model: Path | str, *, name: str = "a", through: str = "", retry_s: float = 60.0
) -> Iterator[SplitDecoder]:
    """A client with the base model's segments, connected as an observer; after the invitation through a proxy."""
    identity = Identity.load(identity_folder)
    invitation = asyncio.run(fetch_invitation(address, identity))
    plan = invitation.plan
    checkpoint = open_checkpoint(str(model))
    limits = setup.wire_limits(plan, checkpoint, name)
    retry = RetryPolicy(retry_s, first_s=0.02, longest_s=0.2)
    segments = setup.load_segments(plan, checkpoint, name, "cpu")
    trunk = RemoteTrunk(through or address, lambda: identity, invitation, limits, Standing, retry, role="observe")
    with trunk:
        yield SplitDecoder(plan, segments, trunk, Boundary.of(plan))


def decoding(
    federation: Federation, name: str = "a", through: str = "", retry_s: float = 60.0
) -> contextlib.AbstractContextManager[SplitDecoder]:
    """A client of a federation; see `connected`."""
    folder = federation.identities / name
    model = federation.plan.model.path
    return connected(federation.address, folder, model, name=name, through=through, retry_s=retry_s)


def alone(decoder: SplitDecoder, name: str) -> SplitDecoder:
    """The same client with a trunk of its own in this process, which nobody shares."""
    plan = decoder.plan
    checkpoint = open_checkpoint(plan.model.path)
    trunk = load_trunk(checkpoint, plan.partition_of(name).trunk(checkpoint.num_blocks), dtype=torch.float32)
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    return SplitDecoder(plan, decoder.segments, LocalTrunk(trunk, plan, name), decoder.boundary)


def greedy(sequences: Sequences, prompt: Sequence[int], new: int) -> list[int]:
    """The answer of one sequence."""
    logits, answer = sequences.extend([prompt]), []
    while True:
        answer.append(int(logits.argmax()))
        if len(answer) == new:
            return answer
        logits = sequences.extend([answer[-1:]])


def answer(decoder: SplitDecoder, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens in a session of their own."""
    with decoder.open(len(prompt) + new) as sequences:
        return greedy(sequences, prompt, new)
