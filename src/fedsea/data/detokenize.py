"""Tokens to text, one token at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from fedsea.errors import ConfigError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the bytes of a character that is not complete."""
_MOST_HELD = 16
"""Tokens that may wait for the rest of a character; more are no character, but a model that writes stray bytes."""
_CONTEXT = 4
"""Tokens before the answer that are looked at; one usually does, a character may have four."""


class TextFilter(Protocol):
    """Changes a text that grows: what both methods return is, joined, the new text."""

    def push(self, text: str) -> str:
        """Text that is certain, now that this follows."""
        ...

    def finish(self) -> str:
        """What waited, now that nothing follows."""
        ...


class TextStream:
    """Text of an answer as it grows: what `push` and `finish` return is, joined, the answer's text.

    A character of several tokens appears when it is whole, and the spaces between words are those that decoding
    the whole answer would give. Text that may be the beginning of a stop string waits; from a stop string on,
    nothing appears. Special tokens have no text.

    Args:
        tokenizer: The model's.
        stop: Strings that end the text; they are not part of it.
        after: Tokens that come before the answer. Without them the answer is a text of its own, and tokenizers that
            write a space before every word leave it out before the first; with them the answer continues these.
        change: Changes the text before stop strings are sought in it, and before it appears.

    Attributes:
        stopped: A stop string was found.
        length: Letters of the text so far, with those that may be the beginning of a stop string.

    Raises:
        ConfigError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Iterable[str] = (),
        *,
        after: Sequence[int] = (),
        change: TextFilter | None = None,
    ) -> None:
        self.stopped = False
        self.length = 0
        self._change = change
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise ConfigError("A stop string is empty and would end every answer before it begins: leave it out.")
        self._special = _special_ids(tokenizer)
        # The last tokens with text, and those that wait: decoding both shows what the latter add.
        self._shown = [token for token in after[-_CONTEXT:] if token not in self._special]
        self._shown_text = self._decode(self._shown)
        self._waiting: list[int] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Text that one more token makes certain; often one token's, at times none or several tokens'."""
        if self.stopped or token_id in self._special:
            return ""
        self._waiting.append(token_id)
        text = self._decode([*self._shown, *self._waiting])
        if len(text) <= len(self._shown_text) or (text.endswith(_UNFINISHED) and len(self._waiting) < _MOST_HELD):
            return ""
        new = text[len(self._shown_text) :]
        self._shown, self._waiting = self._waiting, []
        self._shown_text = self._decode(self._shown)
        return self._release(new if self._change is None else self._change.push(new))

    def finish(self) -> str:
        """What waited, now that no token follows."""
        if self.stopped:
            return ""
        new = self._decode([*self._shown, *self._waiting])[len(self._shown_text) :]
        self._shown, self._shown_text, self._waiting = [], "", []
        if self._change is not None:
            new = self._change.push(new) + self._change.finish()
        text = self._release(new)
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        begins = self.length - len(self._held)
        self.length += len(new)
        self._held = ""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            self.length = begins + min(found)
            return text[: min(found)]
        length = max((_overlap(text, stop) for stop in self._stop), default=0)
        if length:
            text, self._held = text[:-length], text[-length:]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop string begins.

    >>> _overlap("see ##", "###"), _overlap("see", "###")
    (2, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
