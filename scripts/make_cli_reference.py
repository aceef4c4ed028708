"""Writes docs/reference/cli.md from the commands themselves; `--check` only says whether it is up to date.

python scripts/make_cli_reference.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedsea import errors
from fedsea.cli.main import INTERNAL, INTERRUPTED, TERMINATED, app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"

_HEAD = """\
<!-- Written by scripts/make_cli_reference.py from the commands. Do not edit. -->

# The command line

`fedsea COMMAND --help` says the same as this page. Options before the command hold for every command:

{globals}

Results go to stdout; progress and the log go to stderr. On a terminal progress is a live display, elsewhere a plain
line every few seconds. Where stdout is closed no command begins (exit code 2); where it cannot be written, as on a
full disk, stderr says so (4, or the code of the error that could not be written). With `--json` a command shows no
progress and ends in one JSON document on one line of stdout: its result, or
`{{"error": {{"code": …, "message": …}}}}`. No output, log or error ever quotes text, tokens or tensor values, but for
the answers that `fedsea generate`, `fedsea chat` and `fedsea quickstart` are there to give.

`fedsea server` and `fedsea train` may be stopped with Ctrl-C or SIGTERM, or be killed: the same command goes on from
the run folder. `FILES...` of `--data` takes several files, so a pattern of the shell works.

## Exit codes

{codes}

## Commands
"""

_OWN_CODES = {
    "FEDSEA": (
        "Another error that fedsea raises; also `fedsea doctor` when something is in the way, and `fedsea ca approve` "
        "answered with no."
    ),
    "CONFIG": "{0} Also an option that does not exist or has a bad value (code `USAGE`).",
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        sys.exit("docs/reference/cli.md is out of date: run python scripts/make_cli_reference.py")


def page() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    parts = [_HEAD.format(globals=_options(root), codes=_codes())]
    parts += [_command(name, command) for name, command in commands(root)]
    return "\n".join(parts).rstrip() + "\n"


def commands(root: Any) -> Iterator[tuple[str, Any]]:
    """Every command with its full name; of a group, those in it."""
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", found) for inner, found in commands(command))
        else:
            yield name, command


def _command(name: str, command: Any) -> str:
    text = inspect.cleandoc(command.help or "")
    return f"### fedsea {name}\n\n{text}\n\n{_options(command)}\n"


def _options(command: Any) -> str:
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for param in command.params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        is_argument = param.param_type_name == "argument"
        spelled = (param.metavar or param.name.upper()) if is_argument else ", ".join(param.opts)
        is_flag = getattr(param, "is_flag", False)
        value = "" if is_argument or is_flag else f" {param.metavar or param.name.upper()}"
        has_default = not is_flag and param.default not in (None, "") and not callable(param.default)
        default = f"`{param.default}`" if has_default else ""
        meaning = (param.help or "").replace("|", "\\|")
        rows.append(f"| `{spelled}{value}` | {'needed' if param.required else default} | {meaning} |")
    return "\n".join(rows) if len(rows) > 2 else "No options."


def _codes() -> str:
    rows = ["| exit code | `code` in JSON | meaning |", "| --- | --- | --- |", "| 0 | | Done. |"]
    for kind in sorted((errors.FedseaError, *_below(errors.FedseaError)), key=lambda kind: kind.exit_code):
        said = " ".join((inspect.getdoc(kind) or "").split("Attributes:")[0].split())
        meaning = _OWN_CODES.get(kind.code, "{0}").format(said)
        if kind.retryable:
            meaning += " The same command may succeed later."
        rows.append(f"| {kind.exit_code} | `{kind.code}` | {meaning} |")
    rows.append("| 20, 21, 22, 23 | | `fedsea audit`: the verdict is PARTIAL, EXPOSED, INCONCLUSIVE, BROKEN. |")
    rows.append(
        f"| {INTERNAL} | `INTERNAL` | Something that fedsea did not foresee; `fedsea --debug …` shows the trace. |"
    )
    rows.append(f"| {INTERRUPTED} | `INTERRUPTED` | Ctrl-C. `fedsea server` ends in good order with 0. |")
    rows.append(f"| {TERMINATED} | `TERMINATED` | SIGTERM. `fedsea server` ends in good order with 0. |")
    return "\n".join(rows)


def _below(kind: type[errors.FedseaError]) -> Iterator[type[errors.FedseaError]]:
    for found in kind.__subclasses__():
        if re.match(r"fedsea\.errors$", found.__module__):
            yield found
            yield from _below(found)


if __name__ == "__main__":
    main()
