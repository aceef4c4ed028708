"""Long lines on a terminal, and elsewhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import sys
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from fedsea.cli import output
from fedsea.observe.logging import _PlainFormatter
from fedsea.observe.terminal import folded

WARNING = "The server reconstructs the text from what it receives: use it only with a server that you would trust."


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    """A terminal of forty columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    with os.fdopen(theirs, "w") as stream:
        yield stream
    os.close(ours)


def test_a_terminal_gets_long_lines_broken_between_words(terminal: TextIO) -> None:
    lines = folded(f"{WARNING}\n  a line-with-hyphens-that-is-longer-than-the-terminal", terminal).splitlines()
    assert max(map(len, lines[:3])) <= 40
    assert " ".join(lines[:3]) == WARNING
    assert lines[3:] == ["  a", "line-with-hyphens-that-is-longer-than-the-terminal"]


def test_pipes_and_files_get_whole_lines() -> None:
    assert folded(WARNING, io.StringIO()) == WARNING


def test_the_log_and_errors_are_broken_so(terminal: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(output, "current", output.Invocation())
    record = logging.LogRecord("fedsea.client.setup", logging.WARNING, "", 0, WARNING, None, None)
    assert max(map(len, _PlainFormatter(logging.INFO).format(record).splitlines())) <= 40
    written: list[str] = []
    monkeypatch.setattr(terminal, "write", written.append, raising=False)
    output.failure("CONFIG", WARNING)
    assert max(map(len, "".join(written).splitlines())) <= 40
