"""Places in a text that are identifiers, and where an identifier may begin and end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedsea.privacy.pseudonyms.typography import HYPHENS


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """One identifier in a text.

    Attributes:
        start: First letter.
        end: Behind its last letter.
        kind: An identifier type, "word", or "pattern:NAME".
    """

    start: int
    end: int
    kind: str


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and (text[at].isalnum() or text[at] == "_")


def joins(text: str, at: int) -> bool:
    """Whether the letters around a place belong to one word, parts joined by a hyphen included.

    What is replaced never begins or ends at such a place, so a surrogate inside a longer word is no surrogate.

    >>> joins("Anna-Lena", 4), joins("Anna-Lena", 5), joins("Anna - Lena", 4), joins("AB", 1)
    (True, True, False, True)
    """
    before, here = _is_word(text, at - 1), _is_word(text, at)
    if before and here:
        return True
    if here and at >= 2 and text[at - 1] in HYPHENS:
        return _is_word(text, at - 2)
    return before and at < len(text) and text[at] in HYPHENS and _is_word(text, at + 1)


def grown(text: str, span: Span) -> Span:
    """The span, made larger until it cuts through no word."""
    start, end = span.start, span.end
    while start > 0 and joins(text, start):
        start -= 1
    while end < len(text) and joins(text, end):
        end += 1
    return Span(start, end, span.kind)


def apart(candidates: Iterable[Span]) -> list[Span]:
    """Spans that do not overlap, in order; of those that do, the earlier candidate, so give the surest first."""
    taken: list[Span] = []
    covered: set[int] = set()
    for span in candidates:
        letters = range(span.start, span.end)
        if span.end > span.start and covered.isdisjoint(letters):
            covered.update(letters)
            taken.append(span)
    return sorted(taken)


def united(own: Iterable[Span], general: Iterable[Span]) -> list[Span]:
    """Spans of both, in order; those that overlap become one that covers all of them.

    So nothing that one of them covers is given out because of another. The kind is that of an own span that covers the
    whole, and else that of the longest general one: what is part of an e-mail address becomes part of another.

    >>> united([Span(5, 12, "word"), Span(40, 50, "word")], [Span(0, 25, "email"), Span(42, 45, "name")])
    [Span(start=0, end=25, kind='email'), Span(start=40, end=50, kind='word')]
    """
    mine = [span for span in own if span.end > span.start]
    groups: list[list[Span]] = []
    end = 0
    for span in sorted([*mine, *general], key=lambda span: span.start):
        if groups and span.start < end:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span.end)
    known = set(mine)
    return [_union(group, known) for group in groups]


def _union(group: list[Span], own: set[Span]) -> Span:
    start, end = group[0].start, max(span.end for span in group)
    whole = [span for span in group if span in own and (span.start, span.end) == (start, end)]
    decisive = whole or [span for span in group if span not in own] or group
    return Span(start, end, max(decisive, key=lambda span: span.end - span.start).kind)
