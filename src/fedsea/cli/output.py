"""How one invocation of `fedsea` speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from fedsea.errors import StorageError
from fedsea.storage import storage_error


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
    """An error: one JSON line on stdout, or one sentence on stderr, also where stdout cannot be written."""
    if current.as_json:
        with contextlib.suppress(StorageError):
            result({"error": {"code": code, "message": message}})
            return
    tell(f"Error: {message}")


class _Checked:
    """Stdout whose errors are sentences; after the first one it takes nothing more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._error: StorageError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._error is not None:
            raise self._error
        with self._refused():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._refused():
            self._stream.flush()

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whoever reads has enough
            _forget(self._stream)
            raise
        except OSError as error:
            _forget(self._stream)
            self._error = storage_error("write", Path("standard output"), error)
            raise self._error from None


class _Lenient:
    """Stderr that loses what cannot be written: no work stops because what is told about it finds no room."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lost():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            _forget(self._stream)


def _forget(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, or the end of the process would fail once more."""
    with contextlib.suppress(OSError):  # of a stream without a number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Within, what cannot be written to stdout is a `StorageError`, and to stderr is lost, whoever writes it."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = cast("TextIO", _Checked(sys.stdout))
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:  # so says Python where it is closed; the next file that is opened would get its number
            sys.stderr = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        sys.stderr = cast("TextIO", _Lenient(sys.stderr))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _line(sentence: str, stream: TextIO) -> None:
    from fedsea.observe.terminal import folded

    stream.write(folded(sentence, stream) + "\n")
    stream.flush()
