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
    assert lines[3:] == ["  a", "  line-with-hyphens-that-is-longer-than-the-terminal"]


FIRST, SECOND = (":".join(f"{byte:02X}" for byte in half) for half in (range(144, 160), range(160, 176)))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"  {FIRST}:{SECOND}", [f"  {FIRST}:", f"  {SECOND}"]),
        (f"Authority {FIRST}:{SECOND}", [f"Authority {FIRST}:", f"          {SECOND}"]),
        (f"told by another way, and in person: {FIRST}:{SECOND}",
         ["told by another way, and in person:", f"  {FIRST}:", f"  {SECOND}"]),
    ],
)  # fmt: skip
def test_a_fingerprint_is_broken_between_its_halves(terminal: TextIO, line: str, shown: list[str]) -> None:
    termios.tcsetwinsize(terminal.fileno(), (24, 79))
    assert folded(line, terminal).splitlines() == shown
    termios.tcsetwinsize(terminal.fileno(), (24, 140))
    assert folded(line, terminal) == line


def test_results_are_broken_so_and_pipes_get_them_whole(
    terminal: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output.say(WARNING)
    assert capsys.readouterr().out == WARNING + "\n"
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(terminal, "write", written.append, raising=False)
    output.say(WARNING)
    assert max(map(len, "".join(written).splitlines())) <= 40


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
