"""Candidates beside one another come out as each would alone, whatever the family's attention and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

from fedsea.model.branching import Branches
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks
from fedsea.model.segments import InputBlocks
from fedsea.types import Partition

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=3),
    "llama4": Llama4TextConfig(
        **LLAMA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        moe_layers=[],
        attention_chunk_size=3,
        no_rope_layers=[1, 0, 1, 0],
        floor_scale=2,
        attn_scale=1.0,
        pad_token_id=0,
    ),
    "diffllama": DiffLlamaConfig(**LLAMA, head_dim=8),
    "gpt2": GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=50, initializer_range=0.2),
}
# Chunks, temperatures and a second attention in each block are not what the attention of branches knows.
DIRECT = {"llama", "mistral", "gpt2"}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def _blocks(folder: Path, k: int) -> InputBlocks:
    return load_input_blocks(open_checkpoint(str(folder)), Partition(k, 1), dtype=torch.float32)


@pytest.mark.parametrize("k", [0, 2])
def test_a_candidate_comes_out_as_it_would_alone(folder: Path, k: int) -> None:
    blocks = _blocks(folder, k)
    draw = torch.Generator().manual_seed(1)
    pasts = torch.randint(50, (3, 6), generator=draw)
    branches = Branches(blocks, 3)
    for position in range(6):
        branches.take(pasts[:, position])
    candidates = torch.randint(50, (3, 5), generator=draw)
    found = branches.peek(candidates)
    again = branches.peek(candidates)
    assert torch.equal(found, again)  # nothing is kept of a candidate
    for row in range(3):
        for column in range(5):
            ids = torch.cat([pasts[row], candidates[row, column : column + 1]])
            with torch.no_grad():
                alone = blocks(ids, [7])[-1]
            torch.testing.assert_close(found[row, column], alone, rtol=1e-4, atol=1e-5)


def test_hypotheses_can_be_chosen_repeated_and_looked_at_in_part(folder: Path) -> None:
    blocks = _blocks(folder, 2)
    pasts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    branches = Branches(blocks, 2)
    for position in range(3):
        branches.take(pasts[:, position])
    candidates = torch.tensor([[7, 8]])
    second = branches.peek(candidates, torch.tensor([1]))
    branches.select(torch.tensor([1, 1, 0]))
    all_three = branches.peek(candidates.expand(3, 2))
    torch.testing.assert_close(all_three[0], second[0])
    torch.testing.assert_close(all_three[1], second[0])
    assert not torch.allclose(all_three[2], second[0])
    assert branches.num == 3


def test_the_way_for_other_families_gives_the_same(folder: Path) -> None:
    blocks = _blocks(folder, 2)
    runs: list[Any] = []
    for padded in (False, True):
        blocks._padded = padded
        branches = Branches(blocks, 2)
        assert branches._direct is (not padded and blocks.model.config.model_type in DIRECT)
        rows = [branches.take(torch.tensor([position, position + 9])) for position in range(5)]
        branches.select(torch.tensor([1, 0]))
        runs.append([*rows, branches.peek(torch.arange(12).view(2, 6), torch.tensor([0, 1]))])
    for direct, whole in zip(*runs, strict=True):
        torch.testing.assert_close(direct, whole, rtol=1e-4, atol=1e-5)
