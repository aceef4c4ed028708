"""Writes the generated pages of docs/reference from the code; `--check` only says whether they are up to date.

    python scripts/make_reference.py [--check]

`plan.md` and `python.md` are generated whole. In `protocol.md` what stands between `<!-- begin: NAME -->` and
`<!-- end: NAME -->` is generated, the rest is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import fedsea
from fedsea import errors
from fedsea.client.results import EvalSummary
from fedsea.client.run import TrainSummary
from fedsea.client.trainer import EvaluationReport, StepReport
from fedsea.plan import ClientEntry, ClientLimits, ClientNoise, FederationPlan
from fedsea.wire import frames, limits
from fedsea.wire.errors import TABLE
from fedsea.wire.transport import DEFAULT_TIMING

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
GENERATED = "<!-- Written by scripts/make_reference.py (`make docs`). Do not edit. -->"


# --- docstrings ---------------------------------------------------------------------------------------------------


def summary_of(thing: Any) -> str:
    """The text of a docstring before its first section, as one paragraph."""
    text = inspect.getdoc(thing) or ""
    head = re.split(r"^(?:Args|Attributes|Returns|Raises|Example|Yields):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(head.split())


def section_of(thing: Any, title: str) -> dict[str, str]:
    """Entries of a docstring's section ("Attributes", "Args", "Raises"), name to text."""
    match = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)+)", (inspect.getdoc(thing) or "") + "\n", re.MULTILINE)
    entries: dict[str, str] = {}
    name = ""
    for line in match[1].splitlines() if match else ():
        if start := re.match(r" {4}(\w+): (.*)", line):
            name = start[1]
            entries[name] = start[2].strip()
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return entries


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


# --- plan.md ------------------------------------------------------------------------------------------------------


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as a person would say it, with its bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [m for item in args[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return type_text(args[0], [*inner, *metadata])
    if origin is typing.Literal:
        return " or ".join(f'`"{value}"`' for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(arg, metadata) for arg in args if arg is not type(None))
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {type_text(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} numbers"
    if origin is dict:
        return "table of text"
    name = {int: "integer", float: "number", bool: "`true` or `false`", str: "text"}[annotation]
    bounds = [f"{sign} {getattr(m, key)}" for m in metadata for key, sign in _BOUNDS.items() if hasattr(m, key)]
    return " ".join([name, ", ".join(bounds)]).strip()


_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def toml_text(value: Any) -> str:
    """A default as it would be written in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    return "{}" if value == {} else repr(value)


def default_text(field: FieldInfo) -> str:
    """The default of a key; what none means is said in the text above the table."""
    if field.default is PydanticUndefined:
        return "**needed**"
    return "the plan's" if field.default is None else f"`{toml_text(field.default)}`"


def section_text(heading: str, model: type[BaseModel]) -> str:
    """One table of the plan: heading, what it is, and its keys."""
    meanings = section_of(model, "Attributes")
    rows = [
        (f"`{key}`", type_text(field.annotation, field.metadata), default_text(field), meanings[key])
        for key, field in model.model_fields.items()
        if not _is_section(field.annotation)
    ]
    return "\n\n".join([f"## {heading}", summary_of(model), table(("key", "type", "default", "meaning"), rows)])


def _is_section(annotation: Any) -> bool:
    inner = [annotation, *typing.get_args(annotation)]
    return any(isinstance(item, type) and issubclass(item, BaseModel) for item in inner)


PLAN_HEAD = f"""{GENERATED}

# The plan

One TOML file at the server holds everything that both sides must agree on. Clients fetch it when they connect; both
sides compare the SHA-256 of its canonical JSON (all keys sorted, defaults written out; the fingerprint of the base
model instead of its path and revision), and a client refuses a plan that goes past its own limits. Nothing in it is
typed in twice.

`fedsea init` writes a commented example. An unknown key is an error. A run folder remembers its plan: with another
one, `fedsea server` and `fedsea train` name the fields that differ and stop.

A relative `model.path` that exists beside the plan file is read from there. Advice on values is in
[Choose settings](../how-to/choose-settings.md)."""

PLAN_RULES = """## Rules between keys

- `aggregation.sync = "step"` needs `training.mode = "batched"`, `training.wait = "all"`, `aggregation.method = "mean"`,
  and `optimizer.clip_scope = "global"` (or `max_norm = 0`).
- `training.min_clients` may not be larger than the number of clients.
- `model.autocast = "bfloat16"` does not go with `model.dtype = "float16"`.
- At least one segment must be trained: with "full", or with "adapter" and a layer that `adapter.targets` names.
- A segment with "adapter" and blocks must hold such a layer; it may be left untrained if it has no blocks, or if
  `adapter.targets` names the head alone.
- `trust.mode = "noised"` needs a standard deviation above 0 in `[noise]`; `"trusted-server"` takes none of its keys.
- A clip in `[noise]` needs noise on the same channel.
- `noise.unit = "token"` needs `input_blocks = 0` and a plan under which no gradients leave the clients.
- `noise.epsilon` needs a clip and noise on every channel on which something leaves a client, and, if clients train
  parameters, `optimizer.clip_scope = "segment"` (or `max_norm = 0`).
- The cut of every client must leave at least one block to the trunk.
- A model that ties its embedding to its head cannot have `adapter.input` and `adapter.output` both `"full"`."""

LIMITS_HEAD = """# The client's limits

The table `[limits]` of a client's own settings file (`fedsea train --settings client.toml`). It never leaves the
client."""


NOISE_HEAD = """# The client's noise

The table `[noise]` of the same file: stricter than the plan's table of that name, or refused. Only with
`trust.mode = "noised"`."""


def plan_page() -> str:
    """`plan.md`."""
    parts = [PLAN_HEAD, section_text("Top level", FederationPlan)]
    for key, field in FederationPlan.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            parts.append(section_text(f"`[{key}]`", model))
    parts += [section_text("`[[clients]]`", ClientEntry), PLAN_RULES, LIMITS_HEAD]
    own = (section_text("`[limits]`", ClientLimits), NOISE_HEAD, section_text("`[noise]` of a client", ClientNoise))
    return "\n\n".join([*parts, *own]) + "\n"


# --- python.md ----------------------------------------------------------------------------------------------------

PYTHON_HEAD = f"""{GENERATED}

# Python

Everything that the commands do is there as a call. The names below are imported as `from fedsea import …`; importing
`fedsea` itself is light, each name brings what it needs. All errors raised on purpose are subclasses of `FedseaError`;
[protocol.md](protocol.md#errors) lists their codes.

[examples/python_api.py](../../examples/python_api.py) is a whole program."""

RETURNED_HEAD = """# What calls return and report

`train` and `train_alone` return a `TrainSummary`, `evaluate` an `EvalSummary`. An observer is any object with the
methods `step(StepReport)` and `evaluation(EvaluationReport)`."""


def signature_text(name: str, thing: Any) -> str:
    """A call as it is written, one argument a line if it is long."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return name
    parts = []
    parameters = list(signature.parameters.values())
    for number, parameter in enumerate(parameters):
        keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if keyword and (number == 0 or parameters[number - 1].kind is not inspect.Parameter.KEYWORD_ONLY):
            parts.append("*")
        parts.append(_parameter_text(parameter))
    returned = signature.return_annotation
    arrow = "" if returned is inspect.Signature.empty or inspect.isclass(thing) else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def _parameter_text(parameter: inspect.Parameter) -> str:
    text = f"{parameter.name}: {_annotation(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    default = parameter.default
    if isinstance(default, Path):
        default = f'Path("{default}")'
    elif "factory" in repr(default):
        default = "{}"
    else:
        default = toml_text(default) if isinstance(default, str) else repr(default)
    return f"{text} = {default}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def name_text(name: str) -> str:
    """One public name: signature, summary, and its sections as tables."""
    thing = getattr(fedsea, name)
    parts = [f"## {name}", summary_of(thing)]
    enters = not (inspect.isclass(thing) and issubclass(thing, BaseModel | BaseException))
    if enters:
        parts.insert(1, f"```python\n{signature_text(name, thing)}\n```")
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        parts.append("Its keys are those of the [plan](plan.md).")
    elif dataclasses.is_dataclass(thing) or inspect.isclass(thing):
        parts += _entries(thing, "Attributes", "attribute")
    parts += _entries(thing, "Args", "argument")
    parts += _entries(thing, "Raises", "raises")
    return "\n\n".join(parts)


def _entries(thing: Any, title: str, head: str) -> list[str]:
    entries = section_of(thing, title)
    return [table((head, "meaning"), [(f"`{key}`", text) for key, text in entries.items()])] if entries else []


def fields_text(cls: type[Any]) -> str:
    """A dataclass that calls return or report: its fields, types and meanings."""
    meanings = section_of(cls, "Attributes")
    rows = [(f"`{f.name}`", f"`{_annotation(f.type)}`", meanings.get(f.name, "")) for f in dataclasses.fields(cls)]
    return "\n\n".join([f"## {cls.__name__}", summary_of(cls), table(("attribute", "type", "meaning"), rows)])


def python_page() -> str:
    """`python.md`."""
    names = sorted(set(fedsea.__all__) - {"__version__"})
    returned = (EvalSummary, TrainSummary, EvaluationReport, StepReport)
    parts = [PYTHON_HEAD, *(name_text(name) for name in names), RETURNED_HEAD, *map(fields_text, returned)]
    return "\n\n".join(parts) + "\n"


# --- protocol.md --------------------------------------------------------------------------------------------------


def messages_block() -> str:
    """Every message: who sends it, its header, what it carries, what it is for."""
    rows = []
    for cls, kind in frames.KINDS.items():
        sender = " or ".join(sorted(kind.senders))
        names = [f.name for f in dataclasses.fields(cls) if f.name != "tensors"]
        carries = "" if kind.channel is None else f"{kind.channel.value}{' or nothing' if kind.optional else ''}"
        meaning = summary_of(cls).partition(": ")[2]
        meaning = meaning[0].upper() + meaning[1:]
        rows.append((f"`{cls.__name__}`", sender, ", ".join(f"`{name}`" for name in names), carries, meaning))
    return table(("message", "sent by", "fields", "tensors", "meaning"), rows)


def errors_block() -> str:
    """Every code: exit code, whether it is retried, gRPC status, meaning."""
    rows = []
    kinds = errors._subclasses(errors.FedseaError)
    for code, row in sorted(TABLE.items(), key=lambda item: kinds[item[0]].exit_code):
        cls = kinds[code]
        says = "the error's own" if row.instead is None else row.instead
        rows.append(
            (f"`{code}`", str(cls.exit_code), "yes" if cls.retryable else "no", row.status.name, summary_of(cls), says)
        )
    return table(("code", "exit", "retried", "gRPC status", "when", "sentence that the peer reads"), rows)


def limits_block() -> str:
    """Bounds that hold whatever the plan says."""
    rows = [
        ("chunk that is sent", f"{limits.CHUNK_BYTES >> 10} KiB"),
        ("chunk that is accepted", f"{limits.MAX_CHUNK_BYTES >> 10} KiB"),
        ("header", f"{limits.MAX_HEADER_BYTES >> 10} KiB"),
        ("plan in a `Welcome`", f"{limits.MAX_PLAN_BYTES >> 20} MiB"),
        ("sentence in a `Failure`", f"{limits.MAX_MESSAGE_CHARACTERS} characters"),
        ("step, round, or count", "2^53"),
        ("silence before a ping", f"{DEFAULT_TIMING.keepalive_s:g} s"),
        ("answer to a ping", f"{DEFAULT_TIMING.keepalive_timeout_s:g} s, then the connection counts as broken"),
        ("acceptance of one chunk by the network", f"{DEFAULT_TIMING.send_timeout_s:g} s"),
        ("look at revocations, of live connections", f"every {DEFAULT_TIMING.check_s:g} s"),
    ]
    return table(("what", "bound"), rows)


BLOCKS: dict[str, Callable[[], str]] = {"messages": messages_block, "errors": errors_block, "limits": limits_block}


def protocol_page(current: str) -> str:
    """`protocol.md` with its generated blocks filled in.

    Raises:
        ValueError: A block's marks are not there.
    """
    for name, block in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->\n", f"\n<!-- end: {name} -->"
        if begin not in current or end not in current:
            raise ValueError(f"protocol.md has no marks for the block {name!r}")
        head, _, rest = current.partition(begin)
        current = head + begin + "\n" + block() + "\n" + end + rest.partition(end)[2]
    return current


def pages() -> dict[Path, str]:
    """Path to content, as the code would have it."""
    protocol = REFERENCE / "protocol.md"
    return {
        REFERENCE / "plan.md": plan_page(),
        REFERENCE / "python.md": python_page(),
        protocol: protocol_page(protocol.read_text(encoding="utf-8")),
    }


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Writes the generated pages of docs/reference.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if not stale:
        print("the reference is up to date")
    elif check:
        print(f"out of date: {', '.join(stale)}; run `make docs`")
    else:
        print(f"wrote {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
