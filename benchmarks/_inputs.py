"""What the benchmarks run on: LLaMA shapes with random weights, a tokenizer of made-up words, silos of random rows."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

EOS = "</s>"
NUM_ROWS = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """A LLaMA shape; embeddings are tied.

    Attributes:
        hidden_size: H.
        intermediate_size: Of the feed-forward layers.
        num_blocks: Transformer blocks.
        num_heads: Attention heads.
        vocab_size: V.
    """

    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(hidden_size=64, intermediate_size=128, num_blocks=4, num_heads=2, vocab_size=512),
    "15m": Shape(hidden_size=288, intermediate_size=768, num_blocks=6, num_heads=6, vocab_size=32000),
    "100m": Shape(hidden_size=768, intermediate_size=2048, num_blocks=12, num_heads=12, vocab_size=32000),
    "7b": Shape(hidden_size=4096, intermediate_size=11008, num_blocks=32, num_heads=32, vocab_size=32000),
}
"""15m is the shape of llama2.c's stories15M, 100m has 110 million parameters, 7b is LLaMA-2-7B with tied embeddings."""


def write_model(folder: Path, shape: Shape, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> None:
    """Save a checkpoint of a shape with random weights, and a tokenizer that knows one word an id.

    Args:
        folder: Where.
        shape: What.
        seed: Of the weights.
        dtype: Of the weights.
        device: Where they are drawn; large shapes take minutes on a CPU.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    config.dtype = getattr(torch, dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(config.dtype)
    model.save_pretrained(folder)
    del model
    words = {EOS: 0} | {f"w{i}": i for i in range(1, shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


def write_silo(
    path: Path, shape: Shape, tokens: tuple[int, int], completion: float = 1.0, seed: int = 0, rows: int = NUM_ROWS
) -> None:
    """Save rows of random words.

    Args:
        path: jsonl file.
        shape: Whose vocabulary is used.
        tokens: Fewest and most tokens of a row, the end token counted.
        completion: Share of a row's tokens that is learned; below 1 the rows are pairs of prompt and completion.
        seed: Of the words.
        rows: How many.
    """
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(1, shape.vocab_size)}" for _ in range(count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            length = rng.randint(*tokens) - 1
            learned = max(1, round(completion * length))
            row = {"prompt": words(length - learned), "completion": words(learned)}
            file.write(json.dumps(row if completion < 1 else {"text": words(length)}) + "\n")
