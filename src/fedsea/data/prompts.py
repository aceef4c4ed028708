"""From what a user asks to the tokens that a model is given: the same templates as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsea.data.rows import RowError
from fedsea.data.templates import chat_prompt_segments
from fedsea.data.tokenizer import beginning_of, ids_of
from fedsea.errors import ConfigError


class PromptMaker:
    """Makes prompts with one tokenizer; any number of threads may use it.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._beginning = beginning_of(tokenizer)

    def text(self, text: str) -> list[int]:
        """Tokens of a plain text, with what the tokenizer puts before one."""
        return self._begun(ids_of(self._tokenizer, [text])[0])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the assistant's next turn begins.

        The tokenizer's chat template makes the text; without one it is the plain form of `fedsea.data`.

        Args:
            messages: Each with "role" and "content".

        Raises:
            ConfigError: The template refuses the conversation.
        """
        try:
            rendered = chat_prompt_segments([dict(message) for message in messages], self._tokenizer)
        except RowError as error:
            raise ConfigError(f"The conversation {error}.") from None
        eos = self._tokenizer.eos_token_id
        tokens: list[int] = []
        parts = ids_of(self._tokenizer, [segment.text for segment in rendered.segments])
        for segment, ids in zip(rendered.segments, parts, strict=True):
            tokens += [*ids, eos] if segment.ends and eos is not None and ids[-1:] != [eos] else ids
        return self._begun(tokens) if rendered.begins else tokens

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._beginning)] == self._beginning else [*self._beginning, *ids]
