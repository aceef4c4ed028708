"""A JSON body in OpenAI's form -> what is asked for, or a sentence that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsea.client.answer import LEAST_PENALTY, MOST_PENALTY
from fedsea.client.gateway.errors import RequestError
from fedsea.client.gateway.fields import Messages, Prompts, Stops, place
from fedsea.client.generation import GenerationSettings
from fedsea.client.pseudonyms import Prompt
from fedsea.data.detokenize import TextFilter

MOST_CHOICES = 64
"""Choices of one request, over all its prompts."""

_IGNORED = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "verbosity", "prediction"),
}
"""Fields that change nothing here."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields that would change the answer, and values with which they do not: others are refused, not passed over."""
_GREEDY_BELOW = 1e-4
"""Temperatures at which the likeliest token has all the probability, and `GenerationSettings` takes but 0."""

_Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    """What both routes take. `top_k`, `min_p` and `repetition_penalty` go past OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: _Temperature = 1.0
    top_p: _Share = 1.0
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=LEAST_PENALTY, le=MOST_PENALTY, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = []

    most: ClassVar[int | None] = None
    """New tokens if the body says nothing; None: as many as the gateway is set to."""

    @property
    def new_tokens(self) -> int | None:
        """How many are asked for."""
        return self.max_tokens if self.max_tokens is not None else self.most

    @property
    def num_logprobs(self) -> int:
        """As in `GenerationSettings`."""
        raise NotImplementedError


class ChatBody(_Body):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def new_tokens(self) -> int | None:
        """How many are asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int:
        """As in `GenerationSettings`."""
        return self.top_logprobs if self.logprobs else -1


class TextBody(_Body):
    """`POST /v1/completions`."""

    prompt: Prompts
    logprobs: int = Field(-1, ge=0, le=20, strict=True)  # chat's is a boolean, and would pass for 0 or 1

    most: ClassVar[int | None] = 16

    @property
    def num_logprobs(self) -> int:
        """As in `GenerationSettings`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


@dataclass(frozen=True, slots=True)
class Choice:
    """One text to generate.

    Attributes:
        index: Its place in the answer.
        prompt: Token ids.
        stop: Strings that end it and are not part of it.
        restore: See `Prompt`.
    """

    index: int
    prompt: tuple[int, ...]
    settings: GenerationSettings
    stop: tuple[str, ...]
    restore: Callable[[], TextFilter] | None = None


def parse(kind: type[ChatBody] | type[TextBody], data: bytes) -> ChatBody | TextBody:
    """Read a body.

    Raises:
        RequestError: It is no JSON, or a field is wrong; never quotes a value.
    """
    try:
        given = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError:
        raise RequestError("The body is not valid JSON.") from None
    if not isinstance(given, dict):
        raise RequestError("The body must be a JSON object.")
    fields = {key: value for key, value in given.items() if value is not None and key not in _IGNORED}
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields.pop(name) not in neutral:
            raise RequestError(f"{name} is not supported here: leave it out.", param=name, reason="unsupported")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = place(first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestError(f"{name}: this field is not known here; leave it out.", param=name, reason="unknown")
    what = "Input should be an object" if first["type"] == "model_type" else first["msg"]  # pydantic's names our class
    return RequestError(f"{name}: {what}.", param=name, reason=first["type"])


def choices_of(
    body: ChatBody | TextBody,
    prompts: list[Prompt],
    *,
    max_tokens: int,
    default_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> list[Choice]:
    """What is to be generated.

    Args:
        body: The request.
        prompts: Its prompts as tokens.
        max_tokens: Longest sequence here, prompt and answer together.
        default_new_tokens: Longest answer if the request says nothing.
        stop_tokens: Ids that end an answer.

    Raises:
        RequestError: There is no prompt, one is empty, or prompt and answer are too long.
    """
    if not prompts:
        raise RequestError("There is no prompt: give at least one.", param="prompt")
    if len(prompts) * body.n > MOST_CHOICES:
        raise RequestError(f"More than {MOST_CHOICES} choices were asked for: send several requests.", param="n")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    greedy = body.temperature < _GREEDY_BELOW or body.top_p == 0
    choices: list[Choice] = []
    for prompt in prompts:
        room = max_tokens - len(prompt.ids)
        wanted = body.new_tokens or max(1, min(default_new_tokens, room))
        if not prompt.ids:
            raise RequestError("A prompt is empty: it needs at least one token.", param="prompt")
        if wanted > room:
            raise RequestError(
                f"Prompt and answer together may have {max_tokens} tokens here; the prompt has {len(prompt.ids)} and "
                f"{wanted} new ones were asked for: shorten the prompt, or ask for fewer.",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                reason="context_length_exceeded",
            )
        for _ in range(body.n):
            index = len(choices)
            settings = GenerationSettings(
                max_new_tokens=wanted,
                temperature=0.0 if greedy else body.temperature,
                top_k=body.top_k,
                top_p=1.0 if greedy else body.top_p,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                seed=None if body.seed is None else (body.seed + index) % 2**63,
                stop_tokens=stop_tokens,
                num_logprobs=body.num_logprobs,
            )
            choices.append(Choice(index, tuple(prompt.ids), settings, stop, prompt.restore))
    return choices
