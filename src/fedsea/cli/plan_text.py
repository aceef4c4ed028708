"""A plan file with every key explained, written from the plan's own models, so that it cannot rot."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedsea.plan import ClientEntry, ClientLimits, ClientNoise, FederationPlan
from fedsea.plan.pseudonyms import PseudonymSettings

_WIDTH = 100
_FILLED_IN = {("ModelSection", "fingerprint")}
"""Keys that the server writes."""
_EXTRA = 'It needs more packages: pip install ".[pseudonyms]" in the folder of fedsea\'s source.'


def plan_text(model: str, clients: Sequence[str]) -> str:
    """A whole plan: `model` and `clients` as given, everything else with its default.

    Args:
        model: Path or hub id of the base model.
        clients: Names of the clients.
    """
    lines = [
        "# The plan of a federation: everything that server and clients must agree on. Only the server's operator",
        "# keeps this file; clients fetch it, and both sides compare its hash. Every key is shown with its default.",
        "",
        "# Shown in logs and by `fedsea status`.",
        'name = "federation"',
        "",
        "# Seeds dropout, the adapters' first values, and each client's order of data.",
        "seed = 0",
    ]
    for key, field in FederationPlan.model_fields.items():
        section = _section_of(field)
        if section is None:
            continue
        lines += ["", *_comment(_summary(section)), f"[{key}]"]
        lines += _keys(section, {"path": model} if key == "model" else {})
    lines += ["", *_comment(_summary(ClientEntry))]
    for number, name in enumerate(clients):
        lines += ["", "[[clients]]", f"name = {json.dumps(name)}"]
        if number == 0:
            lines += [f"# {key} = {example}" for key, example in _own_values()]
    return "\n".join(lines) + "\n"


def settings_text() -> str:
    """A client's settings: its limits, with their defaults, and how its own noise and pseudonyms would be written."""
    lines = [
        "# Settings of one client: `fedsea train --settings client.toml`. This file never leaves the machine.",
        "",
        *_comment(_summary(ClientLimits)),
        "[limits]",
        *_keys(ClientLimits, {}),
        "",
        *_comment(_summary(ClientNoise)),
        "# [noise]",
    ]
    for key, said in _attributes(ClientNoise).items():
        lines += [*_comment(said), f"# {key} = 1.0"]
    lines += ["", *_comment(_summary(PseudonymSettings)), *_comment(_EXTRA), "# [pseudonyms]"]
    explained = _attributes(PseudonymSettings)
    for key, field in PseudonymSettings.model_fields.items():
        lines += [*_comment(explained[key]), f"# {key} = {_toml(field.get_default(call_default_factory=True))}"]
    return "\n".join(lines) + "\n"


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation: Any = field.annotation
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _keys(section: type[BaseModel], given: dict[str, Any]) -> list[str]:
    """Each key with its explanation above it."""
    lines: list[str] = []
    explained = _attributes(section)
    for key, field in section.model_fields.items():
        said = explained.get(key, "")
        text = " ".join(part for part in (said, _allowed(field, said)) if part)
        if (section.__name__, key) in _FILLED_IN:
            lines += _comment(f"{key}: {text}")
            continue
        lines += _comment(text)
        lines.append(f"{key} = {_toml(given.get(key, field.default))}")
    return lines


def _own_values() -> Iterable[tuple[str, str]]:
    for key, field in ClientEntry.model_fields.items():
        if not field.is_required():
            yield key, "4" if "sequences" in key else "2"


def _summary(model: type[BaseModel]) -> str:
    """The docstring without its `Attributes:`."""
    return " ".join(inspect.getdoc(model).split("Attributes:")[0].split()) if model.__doc__ else ""  # type: ignore[union-attr]


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring says of each attribute."""
    _, _, block = (inspect.getdoc(model) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for item in re.split(r"\n(?=    \w+: )", "\n" + block.rstrip()):
        name, colon, text = item.strip().partition(": ")
        if colon:
            found[name] = " ".join(text.split())
    return found


def _allowed(field: FieldInfo, said: str) -> str:
    """Choices or bounds, as far as the type states them and `said` does not."""
    if choices := [json.dumps(choice) for choice in _choices(field.annotation)]:
        return "" if all(choice in said for choice in choices) else f"One of {', '.join(choices)}."
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    bounds = [
        f"{word} {getattr(item, kind.__name__.lower()):.10g}"
        for item in field.metadata
        for kind, word in words.items()
        if isinstance(item, kind)
    ]
    return f"{' and '.join(bounds).capitalize()}." if bounds else ""


def _choices(annotation: Any) -> tuple[str, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _toml(value: Any) -> str:
    """A default as TOML writes it, which for these types is as JSON does."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2)]
