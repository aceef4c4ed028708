"""Lines for a terminal, which breaks long ones in the middle of a word."""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

_FINGERPRINT = re.compile(r"(?<![0-9A-F:])((?:[0-9A-F]{2}:){16})((?:[0-9A-F]{2}:){15}[0-9A-F]{2})(?![0-9A-F:])")


def folded(text: str, stream: TextIO) -> str:
    """The same with long lines broken between words, if `stream` is a terminal; files and pipes get whole lines.

    Args:
        text: One line or several; what they are set in stays.
        stream: Where it goes.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):  # ValueError: it is closed, or has no number
        width = 0
    if width < 1:
        return text
    return "\n".join(_folded(line, width) for whole in text.split("\n") for line in _in_halves(whole, width))


def takes_seconds(what: str) -> str:
    """The line for a beginning after which nothing may be seen for a while, where there is no spinner."""
    return f"{what[0].upper()}{what[1:]}, which takes some seconds."


def with_fingerprints_in_halves(text: str) -> str:
    """The same with a break after the sixteenth byte of every SHA-256 fingerprint, which is 95 columns long."""
    return _FINGERPRINT.sub(r"\1\n\2", text)


def _in_halves(line: str, width: int) -> list[str]:
    """The line, or its pieces if it is too long and has a fingerprint in it, whose halves stand below each other."""
    found = _FINGERPRINT.search(line)
    if found is None or len(line) <= width:
        return [line]
    first, second = found.groups()
    before, after = line[: found.start()], line[found.end() :]
    if found.start() + len(first) <= width:
        return [before + first, " " * found.start() + second + after]
    indent = _indent(line)
    return [before.rstrip(), f"{indent}  {first}", f"{indent}  {second}{after}"]


def _folded(line: str, width: int) -> str:
    return textwrap.fill(
        line,
        width,
        subsequent_indent=_indent(line),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" "))]
