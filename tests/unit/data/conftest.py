"""Tokenizers and files made on the spot: one token a byte, so that a test can read its ids back as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedsea.data import Silo, open_silo
from fedsea.plan import DataSection

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(beginning: tuple[str, ...] = ("<s>",), chat_template: str | None = None) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<g>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if beginning:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{' '.join(beginning)} $A", special_tokens=[(token, vocab[token]) for token in beginning]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(beginning=(), chat_template=CHAT_TEMPLATE)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Iterable[Any] | bytes | str, name: str = "silo.jsonl") -> Path:
        path = tmp_path / name
        if not isinstance(rows, bytes | str):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return path

    return write


@pytest.fixture
def silo(write: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Silo]:
    """Opens a silo of the given rows; keywords of the data section and of `open_silo`."""

    def silo(rows: Any, name: str = "silo.jsonl", *, tokenizer: Any = tokenizer, **settings: Any) -> Silo:
        arguments = {key: settings.pop(key) for key in ("format", "on_bad_row", "seed") if key in settings}
        section = DataSection(**{"holdout": 0.0, **settings})
        return open_silo([write(rows, name)], tokenizer, section, **{"seed": 0, **arguments})

    return silo


@pytest.fixture(scope="session")
def spoken(tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[str, str]]:
    """A sequence as text, and its targets as text ("·" where no loss is taken)."""

    def spoken(sequence: Any) -> tuple[str, str]:
        def one(token: int) -> str:
            return "·" if token < 0 else str(tokenizer.decode([token]))

        return tokenizer.decode(sequence.ids.tolist()), "".join(one(token) for token in sequence.targets.tolist())

    return spoken
