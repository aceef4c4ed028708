"""Names of people, without a model: titles, known first and last names, and what was a name elsewhere in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedsea.privacy.pseudonyms.lexicon import Lexicon
from fedsea.privacy.pseudonyms.spans import Span
from fedsea.privacy.pseudonyms.words import AMBIGUOUS, NO_NAMES, PARTICLES, STRONG_TITLES, TITLES

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019](?!s\b)[^\W\d_]+)?(?:-[^\W\d_]+)*")
_GAP = re.compile(r"[ \t\n]{1,2}(?:[^\W\d_]\.\s?){0,2}")
_GERMAN = re.compile(r"\b(?:der|die|das|und|ist|mit|wurde|nicht|ein|eine|bei|wird|im|zur|vom)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|and|is|was|with|of|to|for|has|his|her|on|at|from)\b", re.IGNORECASE)


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
        if lower.endswith("s") and not self._known(lower) and self._known(lower[:-1]):
            return word[:-1]
        return word

    def find(self, text: str) -> Iterator[Span]:
        """Names, a span for each of their words, in order."""
        words = list(_WORD.finditer(text))
        german = len(_GERMAN.findall(text)) >= len(_ENGLISH.findall(text))
        found: set[int] = set()
        for number in range(len(words)):
            if number not in found:
                found |= self._here(text, words, number, german)
        known = {words[number].group().lower() for number in found} - NO_NAMES
        for number, match in enumerate(words):
            lower = match.group().lower()
            again = lower in known or (lower.endswith("s") and lower[:-1] in known)
            if number in found or (again and _capital(match.group())):
                yield Span(match.start(), match.end(), "name")

    def _here(self, text: str, words: list[re.Match[str]], number: int, german: bool) -> set[int]:
        """Numbers of words that are a name beginning at this one."""
        word = words[number].group()
        lower = word.lower()
        if lower in self._own:
            return {number}
        if not _capital(word) and lower not in TITLES:
            return set()
        if lower in TITLES and (word != lower or number == 0 or not german or lower in STRONG_TITLES):
            following = self._titled(text, words, number, german)
            if following:
                return following
        if self._is_first(lower):
            rest = self._rest(text, words, number, german)
            if rest or lower not in AMBIGUOUS:
                return {number, *rest}
        if self._is_last(lower) and lower not in AMBIGUOUS:
            return {number}
        return self._reversed(text, words, number)

    def _titled(self, text: str, words: list[re.Match[str]], number: int, german: bool) -> set[int]:
        at = number + 1
        while at < len(words) and (words[at].group().lower() in TITLES or words[at].group().lower() in {"med", "dent"}):
            if not _near(text, words, at - 1, title=True):
                return set()
            at += 1
        at = self._behind_particles(text, words, at)
        if at >= len(words) or not _near(text, words, at - 1, title=True) or not self._may_be(words[at].group()):
            return set()
        weak = words[number].group().lower() not in STRONG_TITLES and words[at - 1].group().lower() not in STRONG_TITLES
        if weak and german and not self._known(words[at].group().lower()):
            return set()  # nouns have capitals too
        return {at, *self._rest(text, words, at, german)}

    def _rest(self, text: str, words: list[re.Match[str]], number: int, german: bool) -> set[int]:
        """Words of the same name behind one."""
        found: set[int] = set()
        for _ in range(3):
            at = self._behind_particles(text, words, number + 1)
            if at >= len(words) or not _near(text, words, at - 1) or not self._may_be(words[at].group()):
                break
            lower = words[at].group().lower()
            sure = (
                self._known(lower)
                or at > number + 1
                or _GAP.fullmatch(text, words[number].end(), words[at].start()) is None
            )
            first = self._is_first(words[number].group().lower()) and not found
            if not sure and not (first if german else first or not found):
                break
            found.add(at)
            number = at
        return found

    def _behind_particles(self, text: str, words: list[re.Match[str]], at: int) -> int:
        start = at
        while at < len(words) and words[at].group() in PARTICLES and at < start + 2 and _near(text, words, at - 1):
            at += 1
        return at

    def _reversed(self, text: str, words: list[re.Match[str]], number: int) -> set[int]:
        """A last name, a comma, and a first name that is known."""
        if number + 1 >= len(words) or not self._may_be(words[number].group()):
            return set()
        between = text[words[number].end() : words[number + 1].start()]
        following = words[number + 1].group()
        if between in (", ", ",") and _capital(following) and self._is_first(following.lower()):
            return {number, number + 1} if following.lower() not in AMBIGUOUS else set()
        return set()

    def _may_be(self, word: str) -> bool:
        return _capital(word) and len(word) > 1 and word.lower() not in NO_NAMES and word.lower() not in TITLES

    def _known(self, lower: str) -> bool:
        return lower in self._own or self._is_first(lower) or self._is_last(lower)

    def _is_first(self, lower: str) -> bool:
        return any(part in self._lexicon.first for part in _parts(lower))

    def _is_last(self, lower: str) -> bool:
        return any(part in self._lexicon.last for part in _parts(lower))


def _parts(lower: str) -> tuple[str, ...]:
    return (lower, *lower.split("-")) if "-" in lower else (lower,)


def _capital(word: str) -> bool:
    return word[0].isupper()


def _near(text: str, words: list[re.Match[str]], number: int, *, title: bool = False) -> bool:
    """Whether nothing but a space (and initials, or a title's full stop or colon) is between a word and the next."""
    between = text[words[number].end() : words[number + 1].start()]
    if title:
        return between in (" ", ". ", ".", ": ", ".-", ", ") or _GAP.fullmatch(between) is not None
    return _GAP.fullmatch(between) is not None
