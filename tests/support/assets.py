"""A base model, its tokenizer and silos, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

NUM_BLOCKS = 5
HIDDEN = 32
WORDS = ("the", "tall", "old", "grey", "ship", "dog", "river", "clerk", "opens", "keeps", "finds", "door", "ledger")


def make_tokenizer(folder: Path) -> int:
    """One token a byte, and four special ones.

    Returns:
        The size of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocab)


def make_checkpoint(folder: Path, **settings: object) -> Path:
    """A LLaMA with random weights, grouped-query attention and untied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = make_tokenizer(folder)
    values = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **(values | settings))).save_pretrained(folder)
    return folder


def write_silo(path: Path, seed: str, num_rows: int = 24) -> Path:
    """Plain text of 3 to 9 words a row, other for every seed."""
    draw = random.Random(seed)
    rows = ({"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))} for _ in range(num_rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toml(values: dict[str, object]) -> str:
    """TOML of a plan: nested tables, and one list of tables."""
    plain, tables = [], []
    for key, value in values.items():
        if isinstance(value, dict):
            tables.append(f"[{key}]\n{toml(value)}")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            tables += [f"[[{key}]]\n{toml(item)}" for item in value]
        else:
            plain.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*plain, *tables]) + "\n"
