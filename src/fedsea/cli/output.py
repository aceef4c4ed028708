"""How one invocation of `fedsea` speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(slots=True)
class Invocation:
    """What the command line said about speaking, and what is to be said when the command is stopped.

    Attributes:
        as_json: Results and errors are one JSON line on stdout.
        debug: Show traces.
        log_level: As given by the user, or None.
        kept: Where what was done so far is kept, as a sentence.
    """

    as_json: bool = False
    debug: bool = False
    log_level: str | None = None
    kept: str = ""


current = Invocation()
"""Of this process; `fedsea.cli.main.run` begins a new one."""


def begin(*, as_json: bool = False, quiet: bool = False, kept: str = "") -> bool:
    """What every command says first.

    Args:
        as_json: The command's `--json`.
        quiet: The command's `--quiet`.
        kept: Sentence for whoever stops the command.

    Returns:
        Whether displays are to show nothing.
    """
    current.as_json = current.as_json or as_json
    current.kept = kept
    if quiet and current.log_level is None and not current.debug:
        logging.getLogger("fedsea").setLevel(logging.WARNING)
    return quiet or as_json


def result(document: dict[str, Any]) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def say(sentence: str) -> None:
    """One line on stdout; a terminal gets it broken between words."""
    _line(sentence, sys.stdout)


def tell(sentence: str) -> None:
    """One line on stderr; a terminal gets it broken between words."""
    _line(sentence, sys.stderr)


def failure(code: str, message: str) -> None:
    """An error: one sentence on stderr, or one JSON line on stdout."""
    if current.as_json:
        result({"error": {"code": code, "message": message}})
    else:
        tell(f"Error: {message}")


def _line(sentence: str, stream: TextIO) -> None:
    from fedsea.observe.terminal import folded

    stream.write(folded(sentence, stream) + "\n")
    stream.flush()
