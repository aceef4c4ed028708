"""Text and bytes of single tokens, for log-probabilities."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""


class Pieces:
    """What each token of a tokenizer stands for, by itself.

    Args:
        tokenizer: A transformers tokenizer: byte-level BPE (GPT-2, LLaMA 3, Qwen), SentencePiece (LLaMA 2, Mistral),
            or any other, whose tokens are then decoded one by one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else {}
        self.bytes = lru_cache(maxsize=65536)(self._bytes)

    def text(self, token: int) -> str:
        """What it looks like; stray bytes of a character that takes several tokens are written in hexadecimal."""
        return self.bytes(token).decode("utf-8", errors="backslashreplace")

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in self._special:
            return (piece or "").encode()
        if self._alphabet:
            if all(letter in self._alphabet for letter in piece):
                return bytes(self._alphabet[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        elif _MARK in piece:
            return str(piece).replace(_MARK, " ").encode()
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text.encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in backend.to_str()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}
