"""Originals put back into an answer while it grows."""

from __future__ import annotations

import threading

from fedsea.privacy.pseudonyms.spans import joins
from fedsea.privacy.pseudonyms.table import Table
from fedsea.privacy.pseudonyms.typography import HYPHENS

_BEFORE = 2
"""Letters before a place that say whether a word begins there."""


class Restorer:
    """Puts originals back into a text that grows: what `push` and `finish` return is, joined, the restored text.

    What may be the beginning of a surrogate waits, so one that comes in several pieces is restored all the same, and
    the result does not depend on where the pieces were cut.

    Args:
        table: What stands for what.
        lock: The table's.
        allowed: See `Table.find`.
    """

    def __init__(self, table: Table, lock: threading.RLock, allowed: frozenset[str] | None = None) -> None:
        self._table = table
        self._lock = lock
        self._allowed = allowed
        self._text = ""
        self._done = 0

    def push(self, text: str) -> str:
        """Text that is certain now."""
        self._text += text
        return self._go(last=False)

    def finish(self) -> str:
        """What waited, now that nothing follows."""
        return self._go(last=True)

    def _go(self, *, last: bool) -> str:
        text, at = self._text, self._done
        start, pieces = at, []
        with self._lock:
            while at < len(text):
                if not last and not joins(text, at) and self._undecided(text, at):
                    break
                found = self._table.at(text, at, self._allowed)
                if found is None:
                    at += 1
                else:
                    pieces += [text[start:at], found.original]
                    at = start = found.end
        pieces.append(text[start:at])
        cut = max(0, at - _BEFORE)
        self._text, self._done = text[cut:], at - cut
        return "".join(pieces)

    def _undecided(self, text: str, at: int) -> bool:
        """Whether what follows could make another surrogate, or none, of what begins here."""
        return self._table.may_begin(text[at:]) or (text[-1] in HYPHENS and self._table.is_one(text[at:-1]))
