"""TOML and JSON to plan and limits; what is wrong in them becomes a sentence that says how to mend it."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedsea.errors import ConfigError
from fedsea.plan.federation import FederationPlan
from fedsea.plan.limits import ClientLimits, ClientSettings
from fedsea.plan.refusals import words_of


def _explain(error: ValidationError, source: str, model: type[BaseModel]) -> ConfigError:
    lines, found = [], error.errors()
    for item in found:
        if any(len(other["loc"]) > len(item["loc"]) == _common(item["loc"], other["loc"]) for other in found):
            continue  # a list is too short only because what is in it is wrong
        where = ".".join(str(part) for part in item["loc"] if part != "[key]") or "plan"
        text = _unknown(item["loc"], model) if item["type"] == "extra_forbidden" else words_of(item)
        lines.append(f"{where}: {text}")
    return ConfigError(f"{source} is not usable: " + "; ".join(lines))


def _common(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> int:
    """Length of the beginning that two places share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _unknown(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """What was probably meant by a key that is none: one written alike, or the table that has one of this name."""
    *above, key = (str(part) for part in loc if isinstance(part, str))
    here: type[BaseModel] | None = model
    for part in above:
        here = _table(here, part) if here is not None else None
    known = list(here.model_fields) if here is not None else []
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key; did you mean `{near[0]}`?"
    tables = {name: found for name in model.model_fields if (found := _table(model, name)) is not None}
    homes = [name for name, table in tables.items() if key in table.model_fields]
    if homes and above[:1] != homes:
        return f"unknown key here; `{key}` belongs to the table [{homes[0]}]"
    if known and len(known) <= 3:
        return f"unknown key; known here: {', '.join(known)}"
    return "unknown key; see docs/reference/plan.md for the keys, or remove it"


def _table(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a table inside a model, also of a list of tables."""
    field = model.model_fields.get(name)
    if field is None:
        return None
    choices = (field.annotation, *typing.get_args(field.annotation))
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def parse_plan(values: dict[str, Any], source: str = "The plan") -> FederationPlan:
    """Check plain values, as from TOML or JSON.

    Raises:
        ConfigError: Names every bad or unknown key.
    """
    try:
        return FederationPlan.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source, FederationPlan) from None


def parse_plan_json(text: str) -> FederationPlan:
    """Check a plan that came over the wire.

    Raises:
        ConfigError: The text is no JSON object, or not a plan.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("The server's plan is not JSON; both sides need compatible versions of fedsea.") from None
    if not isinstance(values, dict):
        raise ConfigError("The server's plan is not a JSON object; both sides need compatible versions of fedsea.")
    return parse_plan(values, "The server's plan")


def _read_toml(path: Path, advice: str = "; `fedsea init` writes an example federation") -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}{advice}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {_twice(str(error))}") from None
    except ValueError:  # Python's own limit, which guards against the time that conversion takes
        raise ConfigError(f"{path} holds a number of thousands of digits: give a shorter one.") from None
    except RecursionError:
        raise ConfigError(f"{path} nests its brackets too deeply to be a plan or settings: remove them.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the TOML file in it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None


def _twice(said: str) -> str:
    """What tomllib says; of a table that comes a second time, what to do about it."""
    found = re.fullmatch(r"Cannot declare \('(.*)',\) twice (\(.*\))", said)
    return (
        said if found is None else f"the table [{found[1]}] comes twice {found[2]}; change the lines of the first one"
    )


def load_plan(path: Path) -> FederationPlan:
    """Read and check a plan file; a relative `model.path` that exists beside the file is made absolute.

    Raises:
        ConfigError: The file is missing, not TOML, or has bad or unknown keys.
    """
    values = _read_toml(path)
    plan = parse_plan(values, str(path))
    beside = path.parent / plan.model.path
    if not Path(plan.model.path).is_absolute() and beside.is_dir():
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"path": str(beside.resolve())})})
    return plan


def load_limits(path: Path) -> ClientLimits:
    """Read a client's limits from the `[limits]` table of its settings file.

    Raises:
        ConfigError: The file is missing, not TOML, or has bad or unknown keys.
    """
    return load_settings(path).limits


def load_settings(path: Path) -> ClientSettings:
    """Read a client's settings file.

    Raises:
        ConfigError: The file is missing, not TOML, or has bad or unknown keys.
    """
    try:
        return ClientSettings.model_validate(_read_toml(path, ": give this client's own settings file"))
    except ValidationError as error:
        raise _explain(error, str(path), ClientSettings) from None
