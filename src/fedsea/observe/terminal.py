"""Lines for a terminal, which breaks long ones in the middle of a word."""

from __future__ import annotations

import os
import textwrap
from typing import TextIO


def folded(text: str, stream: TextIO) -> str:
    """The same with long lines broken between words, if `stream` is a terminal; files and pipes get whole lines.

    Args:
        text: One line or several.
        stream: Where it goes.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):  # ValueError: it is closed, or has no number
        width = 0
    if width < 1:
        return text
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        for line in text.split("\n")
    )
