"""What stands for what, in memory, both ways; and surrogates found in a text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedsea.privacy.pseudonyms.spans import joins
from fedsea.privacy.pseudonyms.typography import plain
from fedsea.privacy.pseudonyms.urls import keeps_too_much
from fedsea.privacy.pseudonyms.vault import Entry

_IN_CAPITALS = frozenset(("name", "word", "email", "address"))
"""What a model may write in capitals, as in a heading, and mean the same."""


@dataclass(frozen=True, slots=True)
class Found:
    """A surrogate in a text."""

    start: int
    end: int
    original: str


class Table:
    """Entries of a mapping, indexed. Grows; used under its owner's lock."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self._by_canonical: dict[tuple[str, str], Entry] = {}
        self._surrogates: dict[tuple[str, str], str] = {}
        self._originals: dict[str, str] = {}
        self._variants: dict[str, str] = {}
        self._known: set[str] = set()
        self._taken: set[str] = set()
        self._sorted: list[str] = []
        self._unsorted: list[str] = []
        self._starts: set[str] = set()
        self._lengths: list[int] = []
        for entry in entries:
            self.add(entry)

    def entry(self, kind: str, canonical: str) -> Entry | None:
        """The entry of an identifier."""
        return self._by_canonical.get((kind, canonical))

    def surrogate(self, kind: str, surface: str) -> str | None:
        """What stands for an identifier as it is written, if anything does yet."""
        return self._surrogates.get((kind, surface))

    def is_free(self, surrogate: str) -> bool:
        """Whether a surrogate stands for nothing yet and is no identifier that is known."""
        lower = surrogate.lower()
        return lower not in self._taken and lower not in self._known

    def stands_for_nothing(self, surrogate: str) -> bool:
        """Whether a surrogate stands for nothing yet."""
        return surrogate.lower() not in self._taken

    def original(self, surrogate: str) -> str | None:
        """What a surrogate stands for, just as it is written here."""
        return self._originals.get(surrogate)

    def add(self, entry: Entry) -> None:
        """Take an entry in, or what is new in one that is here.

        A surrogate that holds a part of what it stands for becomes an original again, and is given out no more.
        """
        if entry.kind == "url" and keeps_too_much(entry.canonical.removeprefix("="), entry.base):
            self.entries.append(entry)
            for surface, surrogate in entry.surfaces.items():
                self._restores(surrogate, surface)
            return
        if self._by_canonical.get((entry.kind, entry.canonical)) is not entry:
            self._by_canonical[entry.kind, entry.canonical] = entry
            self.entries.append(entry)
        self._taken.add(entry.base.lower())
        self._known.add(entry.canonical.lower())
        for surface, surrogate in entry.surfaces.items():
            if (entry.kind, surface) in self._surrogates:
                continue
            self._surrogates[entry.kind, surface] = surrogate
            self._restores(surrogate, surface)
        self._vary(entry)

    def find(self, text: str, start: int = 0, *, allowed: frozenset[str] | None = None) -> Iterator[Found]:
        """Surrogates in a text, from left to right, the longest at each place.

        Args:
            text: The text.
            start: Where to begin.
            allowed: Take only these for surrogates (as they were given out; other forms of them too).
        """
        at = start
        while at < len(text):
            found = self.at(text, at, allowed)
            if found is None:
                at += 1
            else:
                yield found
                at = found.end

    def at(self, text: str, at: int, allowed: frozenset[str] | None = None) -> Found | None:
        """The longest surrogate that begins at a place."""
        if text[at : at + 2] not in self._starts or joins(text, at):
            return None
        for length in self._lengths:
            piece = text[at : at + length]
            original = self._originals.get(piece) or self._variants.get(piece)
            if original is None or len(piece) < length or joins(text, at + length):
                continue
            if allowed is None or piece.lower() in allowed:
                return Found(at, at + length, original)
        return None

    def may_begin(self, tail: str) -> bool:
        """Whether a text could be the beginning of a surrogate, or a whole one."""
        if len(tail) >= 2 and tail[:2] not in self._starts:
            return False
        if self._unsorted:
            self._sorted = sorted([*self._sorted, *self._unsorted])
            self._unsorted = []
        here = bisect_left(self._sorted, tail)
        return here < len(self._sorted) and self._sorted[here].startswith(tail)

    def is_one(self, text: str) -> bool:
        """Whether a text is a surrogate, in whatever form."""
        return text in self._originals or text in self._variants

    def _restores(self, surrogate: str, surface: str) -> None:
        self._originals[surrogate] = surface
        self._known.add(surface.lower())
        self._taken.add(surrogate.lower())
        self._index(surrogate)

    def _vary(self, entry: Entry) -> None:
        """Other forms that a model may write: with ordinary blanks and hyphens, in capitals, in the genitive."""
        for surface, surrogate in list(entry.surfaces.items()):
            forms = [(plain(surface), plain(surrogate))]
            if entry.kind in _IN_CAPITALS:
                forms.append((surface.upper(), surrogate.upper()))
            if entry.kind == "name":
                forms.append((f"{surface}s", f"{surrogate}s"))
            for old, new in forms:
                if new not in self._originals and new not in self._variants:
                    self._variants[new] = old
                    self._index(new)

    def _index(self, surrogate: str) -> None:
        self._unsorted.append(surrogate)
        self._starts.add(surrogate[:2])
        if (length := len(surrogate)) not in self._lengths:
            self._lengths = sorted([*self._lengths, length], reverse=True)
