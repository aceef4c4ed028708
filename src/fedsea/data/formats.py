"""Formats of rows: which columns they have, how they are recognised, and what makes a row bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedsea.data.rows import RowError, Values
from fedsea.errors import ConfigError

FormatName = Literal["auto", "text", "prompt_completion", "instruction", "chat"]

_ROLES: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "response"),
    "chat": ("messages", "role", "content"),
}
_OPTIONAL = ("input", "role", "content")
_NAMING = "name yours by role with --field ROLE=COLUMN"


@dataclass(frozen=True)
class DataFormat:
    """Format of a silo's rows.

    Attributes:
        name: "auto" decides by the first row.
        fields: Role to column name, where columns do not have the recognised names; see `fedsea.data`.

    Raises:
        ConfigError: An unknown format, a role that it does not have, or one that is missing.
    """

    name: FormatName = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in get_args(FormatName):
            raise ConfigError(f"There is no data format {self.name!r}; use one of {', '.join(get_args(FormatName))}.")
        if not self.fields or self.name == "auto":
            return
        roles = _ROLES[self.name]
        if unknown := sorted(set(self.fields) - set(roles)):
            raise ConfigError(f"Format {self.name} has no role {', '.join(unknown)}; its roles are {', '.join(roles)}.")


@dataclass(frozen=True)
class _Shape:
    """A way to write a format: the columns of its required and optional roles."""

    name: FormatName
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# In this order: rows that carry a rendered `text` beside its parts (as Alpaca's do) are read by their parts.
_SHAPES = (
    _Shape("chat", {"messages": ("messages",)}),
    _Shape(
        "instruction",
        {"instruction": ("instruction",), "response": ("output", "response")},
        {"input": ("input", "context")},
    ),
    _Shape("prompt_completion", {"prompt": ("prompt",), "completion": ("completion",)}),
    _Shape("instruction", {"instruction": ("question",), "response": ("answer",)}, {"input": ("context",)}),
    _Shape("text", {"text": ("text",)}),
)


@dataclass(frozen=True)
class RowReader:
    """A resolved format: takes the parts out of a row.

    Attributes:
        name: The format, never "auto".
        required: Role to column.
        optional: Columns of the role `input`; the first that a row fills counts.
        keys: Names of role and content within a chat's message.
    """

    name: FormatName
    required: Mapping[str, str]
    optional: tuple[str, ...] = ()
    keys: tuple[str, str] = ("role", "content")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that may be read."""
        return (*self.required.values(), *self.optional)

    def texts(self, values: Values) -> dict[str, str]:
        """Text of each role of a row; an absent input is "".

        Raises:
            RowError: A column is missing or holds no text.
        """
        found = {role: _text(values, column) for role, column in self.required.items()}
        for column in self.optional:
            if values.get(column) is not None and not found.get("input"):
                found["input"] = _text(values, column)
        return found

    def messages(self, values: Values) -> list[dict[str, str]]:
        """The messages of a chat row, as `{"role": …, "content": …}`.

        Raises:
            RowError: They are not a list of such messages.
        """
        column, (role, content) = self.required["messages"], self.keys
        messages = values.get(column)
        if not isinstance(messages, list) or not messages:
            raise RowError(f"must have a list of messages in {column!r}")
        plain = []
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict):
                raise RowError(f"has no {{{role!r}, {content!r}}} object as message {number}")
            try:
                plain.append({"role": _text(message, role), "content": _text(message, content)})
            except RowError as error:
                raise RowError(f"has a bad message (number {number}), which {error}") from None
        return plain

    def all_texts(self, values: Values) -> list[str]:
        """A row's texts, in order; none if none can be taken."""
        taken: list[str] = []

        def take(rows: Sequence[Sequence[str]]) -> list[list[str]]:
            taken.extend(text for texts in rows for text in texts)
            return [list(texts) for texts in rows]

        self.rewritten([values], take)
        return taken

    def rewritten(
        self, rows: Sequence[Values], rewrite: Callable[[Sequence[Sequence[str]]], list[list[str]]]
    ) -> list[Values]:
        """Rows whose texts are changed, all in one call; one from which no text can be taken stays as it is."""
        texts: list[list[str]] = []
        found: list[dict[str, str] | list[dict[str, str]] | None] = []
        for values in rows:
            try:
                row = self.messages(values) if self.name == "chat" else self.texts(values)
            except RowError:
                found.append(None)
                continue
            found.append(row)
            texts.append([*row.values()] if isinstance(row, dict) else [message["content"] for message in row])
        new = (text for changed in rewrite(texts) for text in changed)
        return [values if row is None else self._filled(row, new) for values, row in zip(rows, found, strict=True)]

    def _filled(self, row: dict[str, str] | list[dict[str, str]], new: Iterator[str]) -> Values:
        if isinstance(row, list):
            role, content = self.keys
            return {self.required["messages"]: [{role: one["role"], content: next(new)} for one in row]}
        texts = {name: next(new) for name in row}
        columns = {"input": self.optional[0], **self.required} if self.optional else self.required
        return {columns[name]: text for name, text in texts.items()}

    def check(self, values: Values) -> None:
        """Refuse a row from which no text can be taken.

        Raises:
            RowError: Says which column, never the text.
        """
        if self.name == "chat":
            self.messages(values)
        else:
            self.texts(values)

    def format(self) -> DataFormat:
        """The format as a setting that names every column."""
        fields = dict(self.required)
        if self.optional:
            fields["input"] = self.optional[0]
        if self.keys != ("role", "content"):
            fields["role"], fields["content"] = self.keys
        return DataFormat(self.name, fields)


def _text(values: Values, column: str) -> str:
    value = values.get(column)
    if value is None:
        raise RowError(f"has nothing in {column!r}; every row needs what the first row has")
    if not isinstance(value, str):
        raise RowError(f"must have text in {column!r}, not a value of type {type(value).__name__}")
    if "\0" in value:
        raise RowError(f"holds a NUL character in {column!r}; remove it")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RowError(f"holds half of a surrogate pair in {column!r}, which is no valid text; write the row again")
    return value


def resolve(wanted: DataFormat, columns: Sequence[str]) -> RowReader:
    """Decide the format from the columns of the first row, and from what the user says.

    Raises:
        RowError: No known format has these columns.
        ConfigError: The fields belong to no format.
    """
    if wanted.fields:
        return _resolve_named(wanted, columns)
    for shape in _SHAPES:
        if wanted.name not in ("auto", shape.name):
            continue
        required = {role: _first(names, columns) for role, names in shape.required.items()}
        if all(required.values()):
            # An absent input may turn up in a later row under any of its names, the ones present here first.
            names = shape.optional.get("input", ())
            return RowReader(shape.name, required, tuple(sorted(names, key=lambda name: name not in columns)))
    if wanted.name != "auto":
        needed = " or ".join(_described(shape) for shape in _SHAPES if shape.name == wanted.name)
        raise RowError(f"has no columns of the format {wanted.name}: {needed}; {_NAMING}")
    needed = "; ".join(_described(shape) for shape in _SHAPES)
    raise RowError(f"has the columns of no known format ({needed}); rename columns, or {_NAMING}")


def _described(shape: _Shape) -> str:
    return " + ".join("|".join(names) for names in shape.required.values())


def _first(names: Sequence[str], columns: Sequence[str]) -> str:
    return next((name for name in names if name in columns), "")


def _resolve_named(wanted: DataFormat, columns: Sequence[str]) -> RowReader:
    fields, name = dict(wanted.fields), wanted.name
    if name == "auto":
        fitting = [known for known, roles in _ROLES.items() if set(fields) <= set(roles)]
        if len(fitting) != 1:
            known = "; ".join(f"{name}: {', '.join(roles)}" for name, roles in _ROLES.items())
            raise ConfigError(
                f"No format has the role or roles {', '.join(sorted(fields))}, which --field or the data format names; "
                f"there are {known}."
            )
        name = fitting[0]  # type: ignore[assignment]
    required = {}
    for role in _ROLES[name]:
        if role in _OPTIONAL:
            continue
        names = [candidate for shape in _SHAPES if shape.name == name for candidate in shape.required[role]]
        required[role] = fields.get(role) or _first(names, columns)
        if not required[role]:
            raise RowError(f"has no column for the role {role!r}; name it with --field {role}=COLUMN")
        if required[role] not in columns:
            raise RowError(
                f"has no column {required[role]!r}, which --field or the data format names: check its spelling"
            )
    if name == "chat":
        return RowReader(name, required, keys=(fields.get("role", "role"), fields.get("content", "content")))
    return RowReader(name, required, (fields["input"],) if "input" in fields else ())
