"""Identifiers out of texts, and back into answers: one client's recogniser, surrogates and mapping together."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedsea.errors import PrivacyError
from fedsea.privacy.pseudonyms.recogniser import Recogniser
from fedsea.privacy.pseudonyms.restoring import Restorer
from fedsea.privacy.pseudonyms.spans import Span, apart, grown
from fedsea.privacy.pseudonyms.surrogates import SurrogateMaker
from fedsea.privacy.pseudonyms.table import Table
from fedsea.privacy.pseudonyms.typography import plain
from fedsea.privacy.pseudonyms.vault import Contents, Entry, Vault

_MOST_ATTEMPTS = 400
_MOST_ESCAPES = 8


@dataclass(frozen=True, slots=True)
class ReplacedText:
    """A text whose identifiers are surrogates.

    Attributes:
        text: The new text.
        spans: Where identifiers were, in the old one.
        surrogates: What stands at each of those places in the new one.
    """

    text: str
    spans: tuple[Span, ...]
    surrogates: tuple[str, ...]


class Pseudonyms:
    """Replaces and restores. Any number of threads, and of processes on one mapping, may use it.

    The same identifier has the same surrogate for as long as the mapping lives, in training and in prompts; two never
    share one; a surrogate is no identifier that was known when it was made (but for dates, which all move by the same
    number of weeks). New ones are durable before a text that has them is given out.

    Args:
        recogniser: What is replaced.
        vault: Where surrogates are kept.
        restore: See `PseudonymSettings`.

    Attributes:
        identity: Changes whenever a text might be rewritten otherwise: another mapping, other settings, other lists.
    """

    def __init__(self, recogniser: Recogniser, vault: Vault, restore: str = "all") -> None:
        self._recogniser = recogniser
        self._vault = vault
        self._restore = restore
        self._lock = threading.RLock()
        contents = vault.open()
        self._secret = contents.secret
        self._maker = SurrogateMaker(contents.secret, recogniser.lexicon, recogniser.names)
        self._table = Table(contents.entries)
        whole = hashlib.sha256(b"fedsea pseudonyms identity\0" + contents.secret + recogniser.identity.encode())
        self.identity = whole.hexdigest()

    @property
    def num_entries(self) -> int:
        """Identifiers that have a surrogate so far."""
        return len(self._table.entries)

    def find(self, text: str) -> list[Span]:
        """What would be replaced."""
        return self._recogniser.find(text)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """See `rows`; each text is a row."""
        return [row[0] for row in self.rows([[text] for text in texts])]

    def rows(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """Texts of rows as they are tokenised in training; a function of each row alone, once it has its surrogates.

        What is an identifier in one text of a row is one in all of them.

        Raises:
            FedseaError: The mapping cannot be read or written: nothing is given out.
        """
        spans = [found for texts in rows for found in self._recogniser.find_all(texts)]
        replaced = iter(self._all([text for texts in rows for text in texts], spans))
        return [[next(replaced).text for _ in texts] for texts in rows]

    def prompt(self, text: str) -> ReplacedText:
        """A prompt, replaced so that what an answer quotes of it is restored exactly.

        A surrogate that stands in the prompt by nature is an identifier of its own here, and gets a surrogate itself.

        Raises:
            FedseaError: The mapping cannot be read or written, or (which no text is known to do) restoring would not
                give the prompt back: nothing is given out.
        """
        return self.conversation([text])[0]

    def conversation(self, texts: Sequence[str]) -> list[ReplacedText]:
        """Prompts that belong together, such as the messages of a chat, each as by `prompt`.

        What is an identifier in one of them is one in all of them.

        Raises:
            FedseaError: As `prompt`.
        """
        spans = self._recogniser.find_all(texts)
        self._all(texts, spans)  # all surrogates first: any of them may stand in any of the texts by nature
        return [self._escaped(text, found) for text, found in zip(texts, spans, strict=True)]

    def _escaped(self, text: str, spans: list[Span]) -> ReplacedText:
        for _ in range(_MOST_ESCAPES):
            replaced = self._all([text], [spans])[0]
            strays = self._strays(text, replaced)
            if not strays:
                return replaced
            touched = {span for span in spans if any(s.start < span.end and span.start < s.end for s in strays)}
            ends = [(s.start, s.end) for s in [*strays, *touched]]
            spans = apart([*_merged(text, ends), *(span for span in spans if span not in touched)])
        raise PrivacyError(
            "The prompt has words that cannot be told from surrogates: change it a little, or list them in "
            "`keep` of [pseudonyms]."
        )

    def restorer(self, given: Iterable[ReplacedText] = ()) -> Restorer:
        """Puts originals back into an answer, piece by piece.

        Args:
            given: The prompts of the answer; used if the settings restore these alone.
        """
        allowed = None
        if self._restore == "prompt":
            surrogates = [surrogate for one in given for surrogate in one.surrogates]
            forms = [form for surrogate in surrogates for form in (surrogate, plain(surrogate), surrogate.upper())]
            lower = {form.lower() for form in forms}
            allowed = frozenset(lower | {f"{surrogate}s" for surrogate in lower})
        self._refresh()
        return Restorer(self._table, self._lock, allowed)

    def restored(self, text: str, given: Iterable[ReplacedText] = ()) -> str:
        """A whole answer with its originals."""
        restorer = self.restorer(given)
        return restorer.push(text) + restorer.finish()

    # --- surrogates -------------------------------------------------------------------------------------------------

    def _all(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[ReplacedText]:
        with self._lock:
            if any(self._missing(text, found) for text, found in zip(texts, spans, strict=True)):
                self._make(texts, spans)
            return [self._put(text, found) for text, found in zip(texts, spans, strict=True)]

    def _missing(self, text: str, spans: Sequence[Span]) -> bool:
        return any(self._table.surrogate(span.kind, text[span.start : span.end]) is None for span in spans)

    def _make(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> None:
        """Give every identifier that has none a surrogate, durably; other processes' new ones are taken over first."""
        with self._vault.locked():
            if self._vault.changed():
                self._load(self._vault.read())
            made: dict[tuple[str, str], Entry] = {}
            try:
                for text, found in zip(texts, spans, strict=True):
                    for span in found:
                        surface = text[span.start : span.end]
                        if self._table.surrogate(span.kind, surface) is None:
                            entry = self._new(span.kind, surface, text)
                            made[entry.kind, entry.canonical] = entry
                if made:
                    self._vault.write(Contents(self._secret, self._table.entries))
            except BaseException:
                self._load(self._vault.read())  # what was not written must not be used
                raise

    def _new(self, kind: str, surface: str, text: str) -> Entry:
        canonical = self._maker.canonical(kind, surface)
        entry = self._table.entry(kind, canonical)
        if entry is not None:
            surrogate = self._maker.written(kind, surface, entry.base)
            if self._usable(kind, surrogate, surface, text, again=True):
                entry.surfaces[surface] = surrogate
                self._table.add(entry)
                return entry
            canonical = f"={surface}"  # two ways to write it would look the same: this one goes by itself
        for attempt in range(_MOST_ATTEMPTS):
            base = self._maker.base(kind, canonical.removeprefix("="), attempt + 1000 * canonical.startswith("="))
            surrogate = self._maker.written(kind, surface, base)
            free = self._table.stands_for_nothing(base) if kind == "date" else self._table.is_free(base)
            if free and self._usable(kind, surrogate, surface, text, again=False):
                entry = Entry(kind, canonical, base, {surface: surrogate})
                self._table.add(entry)
                return entry
        raise PrivacyError(
            f"There are no more surrogates of the kind {kind} in this form: nothing was given out. If it is a pattern "
            "of your own, let it match longer identifiers."
        )

    def _usable(self, kind: str, surrogate: str, surface: str, text: str, *, again: bool) -> bool:
        table = self._table
        if table.original(surrogate) is not None or len(surrogate) < 2 or surrogate == surface:
            return False
        if kind == "date":
            return True  # by the same number of weeks always, or intervals would not be true
        return surrogate not in text and (again or table.is_free(surrogate))

    def _put(self, text: str, spans: Sequence[Span]) -> ReplacedText:
        pieces, surrogates, at = [], [], 0
        for span in spans:
            surrogate = self._table.surrogate(span.kind, text[span.start : span.end])
            assert surrogate is not None, "an identifier without a surrogate was to be given out"
            pieces += [text[at : span.start], surrogate]
            surrogates.append(surrogate)
            at = span.end
        return ReplacedText("".join([*pieces, text[at:]]), tuple(spans), tuple(surrogates))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _strays(self, text: str, replaced: ReplacedText) -> list[Span]:
        """Places of the prompt from which restoring would make something else; none if it gives the prompt back."""
        places, shift = [], 0
        for span, surrogate in zip(replaced.spans, replaced.surrogates, strict=True):
            begin = span.start + shift
            places.append((begin, begin + len(surrogate), span))
            shift += len(surrogate) - (span.end - span.start)
        right = {(begin, end): text[span.start : span.end] for begin, end, span in places}
        strays, seen = [], set()
        with self._lock:
            for found in self._table.find(replaced.text):
                seen.add((found.start, found.end))
                if right.get((found.start, found.end)) != found.original:
                    strays.append(Span(_back(found.start, places), _back(found.end, places, end=True), "word"))
        strays += [span for begin, end, span in places if (begin, end) not in seen]
        return strays

    def _refresh(self) -> None:
        """Take over what other processes have added."""
        with self._lock:
            if self._vault.changed():
                with self._vault.locked():
                    self._load(self._vault.read())

    def _load(self, contents: Contents) -> None:
        if contents.secret != self._secret:
            raise PrivacyError(
                f"The mapping {self._vault.path} was exchanged while it was in use: start again with the one that "
                "belongs here."
            )
        # In place: restorers of answers under way go on with it.
        self._table.__init__(contents.entries)  # type: ignore[misc]


def _back(at: int, places: Sequence[tuple[int, int, Span]], *, end: bool = False) -> int:
    """A place of the new text in the old one; inside a surrogate, the place where what it stands for begins or ends."""
    shift = 0
    for begin, until, span in places:
        if at <= begin:
            break
        if at < until or (end and at == until):
            return span.end if end else span.start
        shift = span.end - until
    return at + shift


def _merged(text: str, ends: list[tuple[int, int]]) -> list[Span]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ends):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return [grown(text, Span(start, end, "word")) for start, end in merged]
