"""All recognisers together: the client's own words and patterns, dates, names, and identifiers that have a form."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from fedsea.errors import ConfigError
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms.dates import find_dates
from fedsea.privacy.pseudonyms.lexicon import load_lexicon
from fedsea.privacy.pseudonyms.names import NameRecogniser
from fedsea.privacy.pseudonyms.patterns import PatternRecogniser
from fedsea.privacy.pseudonyms.spans import Span, apart, grown, united
from fedsea.privacy.pseudonyms.typography import even, joined, plain

VERSION = 3
"""Counted up whenever other places of a text would be found, so that an interrupted run notices."""

_MOST_WORDS = 200_000
_LEAST_AGAIN = 5
"""Letters of a number by which it is known again in another text."""


class Recogniser:
    """Finds identifiers. What is found in a text depends on that text and the settings alone.

    Args:
        settings: What is looked for.
        folder: Where relative paths of the settings begin.

    Attributes:
        lexicon: Word lists in use.
        names: The recogniser of names.
        identity: Changes whenever something else might be found.

    Raises:
        ConfigError: A file of words cannot be read, or a package is missing.
    """

    def __init__(self, settings: PseudonymSettings, folder: Path) -> None:
        self._types = frozenset(settings.types)
        self._custom = {f"pattern:{name}": re.compile(pattern) for name, pattern in settings.patterns.items()}
        words = [*settings.words, *_listed(folder, settings.word_files)]
        names = [name for line in _listed(folder, settings.name_files) for name in plain(line).split()]
        own_names = frozenset(name.lower() for name in names)
        self._words = _Phrases(words)
        self._keep = _Phrases(settings.keep)
        self.lexicon = load_lexicon(settings.languages)
        self.names = NameRecogniser(self.lexicon, own_names)
        self._patterns = PatternRecogniser(settings.languages, self.lexicon)
        about = [VERSION, sorted(self._types), settings.languages, settings.patterns, sorted(words), sorted(own_names),
                 sorted(settings.keep), self.lexicon.sha256]  # fmt: skip
        self.identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def find_all(self, texts: Sequence[str]) -> list[list[Span]]:
        """Identifiers of texts that belong together: what is one in any of them is one in all, as `find` gives them."""
        alone = [self.find(text) for text in texts]
        if len(texts) == 1 or not any(alone):
            return alone
        seen = {(span.kind, even(text[span.start : span.end])) for text, found in zip(texts, alone, strict=True)
                for span in found}  # fmt: skip
        return [self.find(text, frozenset(seen)) for text in texts]

    def find(self, text: str, seen: frozenset[tuple[str, str]] = frozenset()) -> list[Span]:
        """Identifiers in order; they do not overlap, and cut through no word.

        Args:
            text: The text.
            seen: Kinds and, with even blanks and hyphens, letters of what was found in texts that belong to this one.
        """
        # A dash may join the groups of one number or stand between two: with the first reading none is cut.
        readings = tuple(dict.fromkeys((joined(even(text)), even(text))))
        forms = tuple(dict.fromkeys((*readings, text)))
        kept = sorted(span for form in forms for span in self._keep.find(form, "keep"))
        starts, ends = [one.start for one in kept], list(accumulate((one.end for one in kept), max))

        def is_kept(span: Span) -> bool:
            # Wholly: a kept word inside an address of the net is no reason to give out the rest of that.
            before = bisect_right(starts, span.start)
            return before > 0 and span.end <= ends[before - 1]

        def chosen(candidates: Iterator[Span]) -> Iterator[Span]:
            return (span for span in (grown(text, one) for one in candidates) if not is_kept(span))

        return united(chosen(self._own(forms)), apart(chosen(self._general(readings, seen))))

    def _own(self, forms: tuple[str, ...]) -> Iterator[Span]:
        """Candidates by the client's own words and patterns."""
        for text in forms:
            yield from self._words.find(text, "word")
            for kind, pattern in self._custom.items():
                for match in pattern.finditer(text):
                    yield Span(match.start(), match.end(), kind)

    def _general(self, readings: tuple[str, ...], seen: frozenset[tuple[str, str]]) -> Iterator[Span]:
        """Candidates by what identifiers look like; these are the same whatever the client's own words are."""
        for text in readings:
            yield from self._formed(text)
        if "name" in self._types:
            elsewhere = frozenset(surface.lower() for kind, surface in seen if kind == "name")
            yield from self.names.find(readings[-1], elsewhere)
        for kind, surface in sorted(seen):
            if kind not in ("name", "date") and len(surface) >= _LEAST_AGAIN and any(map(str.isdigit, surface)):
                for match in re.finditer(rf"(?<!\w){re.escape(surface)}(?!\w)", readings[-1]):
                    yield Span(match.start(), match.end(), kind)

    def _formed(self, text: str) -> Iterator[Span]:
        dates = (Span(start, end, "date") for start, end in find_dates(text)) if "date" in self._types else iter(())
        formed = [span for span in self._patterns.find(text) if span.kind in self._types]
        # A date may look like a phone number, and a part of an account number like a date.
        yield from (span for span in formed if span.kind not in ("phone", "plate"))
        yield from dates
        yield from (span for span in formed if span.kind in ("phone", "plate"))


class _Phrases:
    """Finds words and phrases of a list, in any case; longer ones first. A long list costs no more."""

    _WORD = re.compile(r"\w+")

    def __init__(self, phrases: list[str] | tuple[str, ...]) -> None:
        self._by_first: dict[str, list[re.Pattern[str]]] = {}
        for phrase in sorted({" ".join(plain(phrase).split()) for phrase in phrases}, key=lambda one: (-len(one), one)):
            first = self._WORD.search(phrase)
            if first is None or first.start() != 0:
                raise ConfigError(
                    "Words of [pseudonyms] must begin with a letter or digit: mend words, word_files or keep."
                )
            pattern = re.compile(r"\s+".join(map(re.escape, phrase.split())), re.IGNORECASE)
            self._by_first.setdefault(first.group().lower(), []).append(pattern)

    def find(self, text: str, kind: str) -> Iterator[Span]:
        if not self._by_first:
            return
        for word in self._WORD.finditer(text):
            for pattern in self._by_first.get(word.group().lower(), ()):
                match = pattern.match(text, word.start())
                if match is not None and _ends(text, match.end()):
                    yield Span(match.start(), match.end(), kind)
                    break


def _ends(text: str, at: int) -> bool:
    return at == len(text) or not (text[at].isalnum() and text[at - 1].isalnum())


def _listed(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Lines of files; blank ones, and those that begin with #, do not count."""
    found: list[str] = []
    for name in files:
        path = folder / name
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ConfigError(f"{path} of [pseudonyms] cannot be read ({error.strerror}): check its path.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} of [pseudonyms] is no UTF-8 text: convert it, for example with iconv.") from None
        found += [line.strip() for line in lines if len(line.strip()) > 1 and not line.startswith("#")]
    if len(found) > _MOST_WORDS:
        raise ConfigError(f"The word files of [pseudonyms] have more than {_MOST_WORDS:,} lines; use shorter ones.")
    return found
