"""What is wrong with a value of a plan or of a client's settings: pydantic's finding, in this project's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MOST_LETTERS = 40
"""So much of a text is quoted."""

_CLIENT_NAME = "use 1 to 63 lower-case letters, digits, dots, dashes or underscores, beginning with a letter or digit"
_KEY_NAME = "is no name for a key here; use 1 to 32 lower-case letters, digits, dashes or underscores, a letter first"

_NO_WHOLE_NUMBER = "{given} is no whole number; give one"
_NO_NUMBER = "{given} is no number; give one"
_NO_BOOL = "{given} is neither true nor false; give one of the two"
_NO_LIST = "{given} is no list; give one, in brackets"
_NO_TABLE = "{given} is no table; give keys with values"

_SENTENCES = {
    "missing": "is missing; add it",
    "greater_than": "{given} is too small; give more than {gt:g}",
    "greater_than_equal": "{given} is too small; give at least {ge:g}",
    "less_than": "{given} is too large; give less than {lt:.10g}",
    "less_than_equal": "{given} is too large; give at most {le:.10g}",
    "finite_number": "{given} is no finite number; give one",
    "int_type": _NO_WHOLE_NUMBER,
    "int_parsing": _NO_WHOLE_NUMBER,
    "int_parsing_size": "this number is too large; give a smaller one",
    "int_from_float": _NO_WHOLE_NUMBER,
    "float_type": _NO_NUMBER,
    "float_parsing": _NO_NUMBER,
    "bool_type": _NO_BOOL,
    "bool_parsing": _NO_BOOL,
    "string_type": "{given} is no text; give one, in quotes",
    "string_too_short": "this text is too short; give at least {min_length} characters",
    "string_too_long": "this text is too long; give at most {max_length} characters",
    "tuple_type": _NO_LIST,
    "list_type": _NO_LIST,
    "dict_type": _NO_TABLE,
    "model_type": _NO_TABLE,
    "model_attributes_type": _NO_TABLE,
    "too_short": "this has {actual_length} entries; give at least {min_length}",
    "too_long": "this has {actual_length} entries; give at most {max_length}",
}
"""By pydantic's type of an error; the names in braces are those of its context."""


def words_of(item: Mapping[str, Any]) -> str:
    """What is wrong and what is allowed, to stand behind the name of the key.

    Args:
        item: One of `ValidationError.errors()`.
    """
    kind, context, given = item["type"], item.get("ctx", {}), _given(item)
    if kind == "string_pattern_mismatch":
        return _KEY_NAME if item["loc"][-1] == "[key]" else _CLIENT_NAME
    if kind == "float_type" and isinstance(item["input"], int) and not isinstance(item["input"], bool):
        kind = "int_parsing_size"  # a whole number beyond all floats
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", '"')
        return f"{given} is not among the choices; give {choices}"
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(given=given, **context)
    return str(item["msg"]).removeprefix("Value error, ")


def _given(item: Mapping[str, Any]) -> str:
    """The value, where it is short and cannot be somebody's text; identifiers are to be told to nobody."""
    value = item.get("input")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        if abs(value) < 10**10 and value == int(value):
            return str(value)
        return f"{value:.10g}" if isinstance(value, float) else "this number"
    if isinstance(value, str) and item["loc"][:1] != ("pseudonyms",):
        shown = value if len(value) <= _MOST_LETTERS else f"{value[:_MOST_LETTERS]}…"
        return f'"{shown}"' if shown.isprintable() else json.dumps(shown)
    return "this"
