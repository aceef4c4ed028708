"""What was generated, in OpenAI's JSON: whole answers, and the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Token:
    """One token with its log-probability, and the likeliest ones in its place.

    Attributes:
        offset: Where its letters begin in the choice's text; tokens of one character share its place, and so does what
            follows bytes that turn out to be none.
    """

    text: str
    data: bytes
    logprob: float
    offset: int
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of a choice."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """A choice is done.

    Attributes:
        reason: "stop" or "length".
    """

    index: int
    reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(slots=True)
class Gathered:
    """A choice as far as it has come."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None


class Form(Protocol):
    """How one of the two routes writes things."""

    def whole(self, choices: Sequence[Gathered], usage: Json) -> Json:
        """The answer to a request without `stream`."""
        ...

    def first(self, index: int) -> list[Json]:
        """What a stream says first of a choice."""
        ...

    def delta(self, delta: Delta) -> Json:
        """More text."""
        ...

    def last(self, end: End) -> Json:
        """The end of a choice."""
        ...

    def usage(self, usage: Json) -> Json:
        """The last piece of a stream that was asked for the counts."""
        ...


class _Base:
    def __init__(self, model: str, prefix: str, kind: str, chunk_kind: str, *, logprobs: bool, usage: bool) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind, self._chunk_kind = kind, chunk_kind
        self._logprobs = logprobs
        self._tail: Json = {"usage": None} if usage else {}

    def _whole(self, choices: list[Json], usage: Json) -> Json:
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def _chunk(self, choice: Json) -> Json:
        return {**self._head, "object": self._chunk_kind, "choices": [choice], **self._tail}

    def usage(self, usage: Json) -> Json:
        """The last piece of a stream that was asked for the counts."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage}


class ChatForm(_Base):
    """`/v1/chat/completions`.

    Args:
        model: Its name, as asked for.
        logprobs: Whether they were asked for.
        usage: Whether a stream was asked for the counts.
    """

    def __init__(self, model: str, *, logprobs: bool, usage: bool) -> None:
        super().__init__(model, "chatcmpl", "chat.completion", "chat.completion.chunk", logprobs=logprobs, usage=usage)

    def whole(self, choices: Sequence[Gathered], usage: Json) -> Json:
        """See `Form`."""
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": self._log(choice.tokens),
                "finish_reason": choice.end.reason if choice.end else None,
            }
            for index, choice in enumerate(choices)
        ]
        return self._whole(written, usage)

    def first(self, index: int) -> list[Json]:
        """See `Form`."""
        return [self._piece(index, {"role": "assistant", "content": ""}, None, None)]

    def delta(self, delta: Delta) -> Json:
        """See `Form`."""
        return self._piece(delta.index, {"content": delta.text}, self._log(delta.tokens), None)

    def last(self, end: End) -> Json:
        """See `Form`."""
        return self._piece(end.index, {}, None, end.reason)

    def _piece(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _log(self, tokens: Sequence[Token]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_entry(token.text, token.data, token.logprob),
                "top_logprobs": [_entry(*other) for other in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class TextForm(_Base):
    """`/v1/completions`; arguments as of `ChatForm`."""

    def __init__(self, model: str, *, logprobs: bool, usage: bool) -> None:
        super().__init__(model, "cmpl", "text_completion", "text_completion", logprobs=logprobs, usage=usage)

    def whole(self, choices: Sequence[Gathered], usage: Json) -> Json:
        """See `Form`."""
        written = [
            self._choice(index, "".join(choice.text), choice.tokens, choice.end.reason if choice.end else None)
            for index, choice in enumerate(choices)
        ]
        return self._whole(written, usage)

    def first(self, index: int) -> list[Json]:  # noqa: ARG002 (the other form's)
        """See `Form`."""
        return []

    def delta(self, delta: Delta) -> Json:
        """See `Form`."""
        return self._chunk(self._choice(delta.index, delta.text, delta.tokens, None))

    def last(self, end: End) -> Json:
        """See `Form`."""
        return self._chunk({"index": end.index, "text": "", "logprobs": None, "finish_reason": end.reason})

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._log(tokens), "finish_reason": reason}

    def _log(self, tokens: Sequence[Token]) -> Json | None:
        """The chosen token is among the likeliest, too: so OpenAI has it."""
        if not self._logprobs:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {text: logprob for text, _, logprob in token.top} | {token.text: token.logprob} for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


def usage_of(choices: Sequence[Gathered], num_each: int) -> Json:
    """Counts over a request: each prompt once, all new tokens.

    Args:
        choices: All of them, in order.
        num_each: How many were made of each prompt.
    """
    ends = [choice.end for choice in choices if choice.end]
    prompt = sum(end.prompt_tokens for end in ends if end.index % num_each == 0)
    new = sum(end.new_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def event(document: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


def _entry(text: str, data: bytes, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(data)}
