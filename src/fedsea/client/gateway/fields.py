"""What single fields of a body hold. Where several forms are allowed, errors are those of the form that was meant."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

_MOST_STOPS = 16
_TEXT, _TEXTS, _PARTS, _TOKENS, _SEVERAL = FORMS = ("<text>", "<texts>", "<parts>", "<tokens>", "<several>")
"""Names of the forms, which pydantic puts into an error's place."""


def place(loc: tuple[int | str, ...]) -> str:
    """The field that an error is about, as in the body.

    >>> place(("messages", 0, "content", "<parts>", 2, "type")), place(("<text>",))
    ('messages.0.content.2.type', '<text>')
    """
    return ".".join(str(part)[:64] for number, part in enumerate(loc) if not number or part not in FORMS)


def _form(value: Any) -> str | None:
    """By the first of a list: what comes after it in another form is an error of its own."""
    if isinstance(value, str):
        return _TEXT
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, int) and not isinstance(first, bool):
        return _TOKENS
    return _SEVERAL if isinstance(first, list) else _TEXTS if first is None or isinstance(first, str) else None


def _text_or(form: str) -> Any:
    return lambda value: _TEXT if isinstance(value, str) else form if isinstance(value, list) else None


def _one_of(choose: Any, sentence: str) -> Discriminator:
    return Discriminator(choose, "invalid_type", f"Input should be {sentence}")


def _only_text(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported", "Only parts of type text are supported here: send text alone")
    return kind


def _no_calls(calls: Any) -> None:
    if calls:
        raise PydanticCustomError("unsupported", "Tools are not supported here: leave this message out")


_AtFirst = Field(fail_fast=True)  # of a list: a body may be wrong a million times
_TokenId = Annotated[int, Field(strict=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Calls = Annotated[None, BeforeValidator(_no_calls)]


class _Part(BaseModel):
    type: Annotated[Literal["text"], BeforeValidator(_only_text)]
    text: str


class Message(BaseModel):
    """One turn; what a client leaves of an earlier answer around its text is passed over."""

    role: Literal["system", "developer", "user", "assistant"]
    tool_calls: _Calls = None
    function_call: _Calls = None
    content: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[_Part], _AtFirst, Tag(_PARTS)],
        _one_of(_text_or(_PARTS), "a text or a list of parts"),
    ]

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
Stops = Annotated[
    Annotated[_Stop, Tag(_TEXT)] | Annotated[list[_Stop], Field(max_length=_MOST_STOPS, fail_fast=True), Tag(_TEXTS)],
    _one_of(_text_or(_TEXTS), "a text or a list of texts"),
]
Prompts = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[list[str], _AtFirst, Tag(_TEXTS)]
    | Annotated[list[_TokenId], _AtFirst, Tag(_TOKENS)]
    | Annotated[list[Annotated[list[_TokenId], _AtFirst]], _AtFirst, Tag(_SEVERAL)],
    _one_of(_form, "a text, token ids, or a list of texts or of lists of token ids"),
]
