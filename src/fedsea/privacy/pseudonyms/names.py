"""Names of people, without a model: titles, known first and last names, and what was a name elsewhere in the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fedsea.privacy.pseudonyms.lexicon import Lexicon
from fedsea.privacy.pseudonyms.spans import Span
from fedsea.privacy.pseudonyms.words import AMBIGUOUS, NO_NAMES, PARTICLES, STRONG_TITLES, TITLES

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019](?!s\b)[^\W\d_]+)?(?:-[^\W\d_]+)*")
_GAP = re.compile(r"[ \t]{1,2}(?:[^\W\d_]\. ?){0,2}")
_BORN = re.compile(
    r"(?<!\w)([^\W\d_][^\W\d_-]+(?:-[^\W\d_]+)*)(?:, | )([^\W\d_][^\W\d_-]+(?:-[^\W\d_]+)*),? "
    r"\(?(?:geb\b|geboren|DOB|born|date of birth|MRN|Fall|Patienten-?ID|Pat\.)"
)
"""A name before a date of birth or a number that only patients have."""
_GERMAN = re.compile(r"\b(?:der|die|das|und|ist|mit|wurde|nicht|ein|eine|bei|wird|im|zur|vom)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|and|is|was|with|of|to|for|has|his|her|on|at|from)\b", re.IGNORECASE)
_AFTER_TITLE = (" ", ". ", ".", ": ", ":", ".-", ", ", ",\n", ",\n\n", "\n")
_FORMAL = frozenset(("name", "unterschrift", "signed", "dear", "liebe", "lieber"))
"""Titles that are also headings."""


class NameRecogniser:
    """Finds names of people.

    Args:
        lexicon: Names that are known.
        own: The client's own names, in lower case: they are names wherever they stand, in any case.
    """

    def __init__(self, lexicon: Lexicon, own: frozenset[str] = frozenset()) -> None:
        self._lexicon = lexicon
        self._own = own

    def stem(self, word: str) -> str:
        """A name without the German genitive's s, if only so it is known.

        The same word has the same stem always: what else is in the text does not matter.
        """
        lower = word.lower()
        if lower.endswith("s") and not self._listed(lower) and self._listed(lower[:-1]):
            return word[:-1]
        return word

    def find(self, text: str, elsewhere: frozenset[str] = frozenset()) -> Iterator[Span]:
        """Names, a span for each of their words, in order.

        Args:
            text: The text.
            elsewhere: Words, in lower case, that are names in texts that belong to this one.
        """
        found = _Sentence(text, self._lexicon, self._own, self._listed).names(elsewhere)
        yield from (Span(start, end, "name") for start, end in found)

    def _listed(self, lower: str) -> bool:
        return lower in self._own or lower in self._lexicon.first or lower in self._lexicon.last


class _Sentence:
    """One text while names are sought in it."""

    def __init__(self, text: str, lexicon: Lexicon, own: frozenset[str], listed: Callable[[str], bool]) -> None:
        self._text = text
        self._first, self._last = lexicon.first, lexicon.last
        self._own = own
        self._listed = listed
        self._words = list(_WORD.finditer(text))
        self._lower = [match.group().lower() for match in self._words]
        self._german = len(_GERMAN.findall(text)) >= len(_ENGLISH.findall(text))

    def names(self, elsewhere: frozenset[str]) -> list[tuple[int, int]]:
        """Places of names: those with a reason of their own, and where the same words, or those, stand again."""
        found: set[int] = set()
        for number in range(len(self._words)):
            if number not in found:
                found |= self._here(number)
        found |= self._born()
        known = ({self._lower[number] for number in found} | elsewhere) - NO_NAMES
        for number, lower in enumerate(self._lower):
            again = lower in known or (lower.endswith("s") and lower[:-1] in known)
            if again and self._capital(number):
                found.add(number)
        return [self._words[number].span() for number in sorted(found)]

    def _here(self, number: int) -> set[int]:
        """Numbers of words that are a name beginning at this one, or right behind it if it is a title."""
        lower = self._lower[number]
        if lower in self._own:
            return {number}
        if lower in TITLES and (named := self._titled(number)):
            return named
        if not self._capital(number):
            return set()
        if self._is_known(number, self._first):
            rest = self._rest(number)
            if rest or self._is_plain(number):
                return {number, *rest}
        if self._is_known(number, self._last) and self._is_plain(number):
            return {number}
        return self._reversed(number)

    def _titled(self, number: int) -> set[int]:
        """The name behind a title."""
        if not (self._capital(number) or number == 0 or not self._german or self._lower[number] in STRONG_TITLES):
            return set()
        at = number + 1
        while at < min(len(self._words), number + 7) and (
            self._lower[at] in TITLES or self._lower[at] in ("med", "dent")
        ):
            if self._between(at - 1) not in _AFTER_TITLE:
                return set()
            at += 1
        between = self._between(at - 1)
        at = self._behind_particles(at)
        while at < len(self._words) - 1 and len(self._lower[at]) == 1 and self._between(at) in (". ", "."):
            at += 1  # initials
        if at >= len(self._words) or not self._may_be(at):
            return set()
        if between not in _AFTER_TITLE and not _GAP.fullmatch(between):
            return set()
        weak = self._lower[number] in _FORMAL and ":" not in between and not self._is_known(at)
        if weak:
            return set()  # the heading of a form
        # Behind a first name that nobody knows comes a last name too; behind a last name anything may.
        sure = ":" in between or (self._lower[number] in STRONG_TITLES and not self._is_known(at, self._last))
        found = {at, *self._rest(at, sure=sure)}
        last = max(found)
        if ":" in between and self._between(last) == ", " and self._may_be(last + 1):
            found.add(last + 1)
        return found

    def _rest(self, number: int, *, sure: bool = False) -> set[int]:
        """Words of the same name behind one of its words."""
        found: set[int] = set()
        sure_all, sure = sure, sure or self._is_known(number, self._first)
        capitals = self._words[number].group().isupper()
        for _ in range(3):
            at = self._behind_particles(number + 1)
            if not _GAP.fullmatch(self._between(at - 1)) or not self._may_be(at):
                break
            alike = not capitals or self._words[at].group().isupper()
            initials = "." in self._between(at - 1)
            if not (
                self._is_known(at) or (alike and (at > number + 1 or initials or sure_all or (sure and not found)))
            ):
                break
            found.add(at)
            number = at
        return found

    def _behind_particles(self, at: int) -> int:
        start = at
        while (
            at < min(len(self._words), start + 2)
            and self._lower[at] in PARTICLES
            and self._between(at - 1) in (" ", ": ")
        ):
            at += 1
        return at

    def _reversed(self, number: int) -> set[int]:
        """A last name, a comma, and a first name that is known, if nothing goes on behind it."""
        if number + 1 >= len(self._words) or not self._may_be(number) or self._between(number) not in (", ", ","):
            return set()
        following = number + 1
        if not self._capital(following) or not self._is_known(following, self._first):
            return set()
        goes_on = re.compile(r" [^\W\d_]").match(self._text, self._words[following].end())
        return {number, following} if not goes_on and self._is_plain(following) else set()

    def _born(self) -> set[int]:
        starts = {match.start(): number for number, match in enumerate(self._words)}
        found: set[int] = set()
        for match in _BORN.finditer(self._text):
            pair = [starts.get(match.start(1)), starts.get(match.start(2))]
            if all(number is not None and self._may_be(number) for number in pair):
                found.update(number for number in pair if number is not None)
        return found

    def _between(self, number: int) -> str:
        """What is between a word and the next."""
        if not 0 <= number < len(self._words) - 1:
            return "\0"
        return self._text[self._words[number].end() : self._words[number + 1].start()]

    def _may_be(self, number: int) -> bool:
        if number >= len(self._words):
            return False
        lower = self._lower[number]
        return self._capital(number) and len(lower) > 1 and lower not in NO_NAMES and lower not in TITLES

    def _capital(self, number: int) -> bool:
        return self._words[number].group()[0].isupper()

    def _is_known(self, number: int, names: frozenset[str] | None = None) -> bool:
        """Whether a word, a part of it, or it without a genitive's s, is on a list."""
        word = self._words[number].group()
        parts = word.split("-") if "-" in word else [word]
        if not all(part[:1].isupper() and part.lower() not in NO_NAMES for part in parts):
            return word.lower() in self._own
        return any(self._on(part.lower(), names) for part in parts)

    def _on(self, lower: str, names: frozenset[str] | None) -> bool:
        listed = self._listed if names is None else names.__contains__
        return listed(lower) or (lower.endswith("s") and len(lower) > 4 and listed(lower[:-1]))

    def _is_plain(self, number: int) -> bool:
        """Whether a known name is no word of a language besides."""
        parts = self._lower[number].split("-")
        known = [part for part in parts if self._on(part, None)]
        return any(part not in AMBIGUOUS and part.removesuffix("s") not in AMBIGUOUS for part in known)
