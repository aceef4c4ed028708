"""Surrogates: for an identifier, realistic ones of the same kind and form, drawn by a keyed function.

A surrogate is a function of the client's secret, the identifier and the number of the attempt; without the secret it
says nothing about the identifier but its form. (The same identifier has the same surrogate always: whoever sees many
texts can count and link. That is what consistent means, and why a pseudonym is no anonymity.)
"""

from __future__ import annotations

import hmac
import re
import string
from collections.abc import Sequence
from functools import partial

from fedsea.privacy.pseudonyms.checksums import iban_completed, luhn_completed
from fedsea.privacy.pseudonyms.dates import shifted
from fedsea.privacy.pseudonyms.lexicon import Lexicon
from fedsea.privacy.pseudonyms.names import NameRecogniser
from fedsea.privacy.pseudonyms.typography import plain
from fedsea.privacy.pseudonyms.urls import url_parts
from fedsea.privacy.pseudonyms.words import ADDRESS_FRAME, SYLLABLES

_LEAST_WEEKS, _MOST_WEEKS = 26, 260
_LONGER = 24
"""Attempts within an identifier's own form; later ones are longer, for there may be no more of that form."""


class Draws:
    """Numbers from HMAC-SHA256 in counter mode."""

    def __init__(self, secret: bytes, *about: str) -> None:
        self._next = partial(hmac.digest, secret, digest="sha256")
        self._about = "\0".join(about).encode()
        self._count = 0

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1; its bias is below 2^-100."""
        block = hmac_block(self._next, self._about, self._count)
        self._count += 1
        return int.from_bytes(block[:16], "big") % limit

    def one_of(self, choices: Sequence[str]) -> str:
        """One of some words."""
        return choices[self.below(len(choices))]


def hmac_block(keyed: partial[bytes], about: bytes, count: int) -> bytes:
    """A block of the stream that belongs to `about`."""
    return keyed(msg=b"%d\0%b" % (count, about))


class SurrogateMaker:
    """Makes surrogates with one client's secret.

    Args:
        secret: 32 bytes.
        lexicon: Names and towns to choose among.
        names: Knows which letters of a name are an ending.
    """

    def __init__(self, secret: bytes, lexicon: Lexicon, names: NameRecogniser) -> None:
        self._secret = secret
        self._lexicon = lexicon
        self._names = names
        weeks = Draws(secret, "dates")
        # Whole weeks, so that days of the week stay true; back, so that no date lies in the future.
        self._days = -7 * (_LEAST_WEEKS + weeks.below(_MOST_WEEKS - _LEAST_WEEKS + 1))

    def canonical(self, kind: str, surface: str) -> str:
        """What several ways to write one identifier have in common; they have one surrogate."""
        if kind == "name" and _style(plain(surface)) != "other":
            return self._names.stem(plain(surface)).lower()
        if kind in ("phone", "card", "iban", "ssn") and plain(surface).isascii():
            return "".join(letter for letter in surface if letter.isalnum() or letter == "+").upper()
        if kind in ("word", "email"):
            return surface.lower()
        return surface

    def base(self, kind: str, canonical: str, attempt: int) -> str:
        """A surrogate of an identifier in its canonical form; another one for every attempt."""
        draws = Draws(self._secret, kind, canonical, str(attempt))
        match kind:
            case "name":
                return self._name(canonical, draws, attempt)
            case "email":
                return self._email(draws, attempt)
            case "url":
                return self._url(canonical, draws, attempt)
            case "address":
                return self._address(canonical, draws, attempt)
            case "date":
                moved = shifted(canonical, self._days + 7 * attempt)
                return moved or _alike(canonical, draws, attempt)
            case "word":
                return self._word(canonical, draws, attempt)
            case "iban" if re.fullmatch(r"[A-Z]{2}\d\d[A-Z0-9]{3,}", canonical, re.ASCII):
                return iban_completed(canonical[:2] + "00" + _alike(canonical[4:], draws, 0))
            case "card" if canonical.isdigit():
                return luhn_completed(canonical[0] + _alike(canonical[1:], draws, 0))
            case "ip":
                return _ip(canonical, draws)
            case "phone":
                return _phone(canonical, draws, attempt)
            case _:
                return _alike(canonical, draws, attempt)

    def written(self, kind: str, surface: str, base: str) -> str:
        """A surrogate as the identifier was written: in capitals, with its spaces, with its genitive."""
        if kind == "name" and plain(surface) != surface:  # its hyphens as they were written
            hyphen = next(old for old, new in zip(surface, plain(surface), strict=True) if old != new)
            return self.written(kind, plain(surface), base).replace("-", hyphen)
        if kind in ("name", "word", "email"):
            style = _style(surface)
            if kind == "name" and style != "other" and len(stem := self._names.stem(surface)) < len(surface):
                return self.written(kind, stem, base) + surface[len(stem) :]
            if style == "upper":
                return base.upper()
            return base.lower() if style == "lower" or kind == "email" else base
        if kind in ("phone", "card", "iban", "ssn") and plain(surface).isascii():
            return _formatted(surface, base)
        return base

    # --- the kinds --------------------------------------------------------------------------------------------------

    def _name(self, canonical: str, draws: Draws, attempt: int) -> str:
        lexicon, lower = self._lexicon, canonical.lower()
        parts = lower.split("-")
        pool: Sequence[str] = lexicon.families
        if parts[0] in lexicon.first:
            pool = lexicon.women if parts[0] in lexicon.female else lexicon.men
        # Pools are finite, people are not: when a dozen draws were taken, double names follow.
        count = len(parts) + (attempt >= 12) + (attempt >= 48)
        return "-".join(draws.one_of(pool) for _ in range(min(count, 4)))

    def _email(self, draws: Draws, attempt: int) -> str:
        lexicon = self._lexicon
        who = lexicon.plain(draws.one_of(lexicon.women if draws.below(2) else lexicon.men))
        family, house = lexicon.plain(draws.one_of(lexicon.families)), lexicon.plain(draws.one_of(lexicon.families))
        number = str(draws.below(90) + 10) if attempt > 2 else ""
        return f"{who}.{family}{number}@{house}.example.{draws.one_of(('com', 'org', 'net'))}"

    def _url(self, canonical: str, draws: Draws, attempt: int) -> str:
        """Scheme, `www.` and port stay; a file without a host goes on without one."""
        scheme, host, port, path = url_parts(canonical)
        if not host and any(letter.isalnum() for letter in path):
            return f"{scheme}{port}{_alike(path, draws, attempt)}"
        www = "www." if host.lower().startswith("www.") else ""
        house = self._lexicon.plain(draws.one_of(self._lexicon.families))
        number = str(draws.below(900) + 100) if attempt > 2 else ""
        return f"{scheme}{www}{house}{number}.example.org{port}{_alike(path, draws, 0)}"

    def _address(self, canonical: str, draws: Draws, attempt: int) -> str:
        """Numbers become others, the words that name something become names; what says street or state stays."""
        pieces: list[str] = []
        words = _split(canonical)
        for number, word in enumerate(words):
            if any(letter.isdigit() for letter in word):
                pieces.append(_alike(word, draws, attempt))
            elif self._is_frame(word, last=number == len(words) - 1):
                pieces.append(word)
            elif word[0].isalpha():
                pieces.append(self._place(word, canonical, draws))
            else:
                pieces.append(word)
        return "".join(pieces)

    def _is_frame(self, word: str, *, last: bool) -> bool:
        lower = word.lower().rstrip(".")
        return (
            word in self._lexicon.streets
            or lower in ADDRESS_FRAME
            or (len(word) <= 2 and word.isupper())
            or (last and len(word) == 1)
        )

    def _place(self, word: str, canonical: str, draws: Draws) -> str:
        for ending in _STREET_ENDINGS:
            if word.lower().endswith(ending) and len(word) > len(ending):
                return draws.one_of(self._lexicon.families) + word[-len(ending) :]
        if word.lower() in self._lexicon.cities or (canonical[:1].isdigit() and canonical.endswith(word)):
            new = draws.one_of(self._lexicon.towns)
        else:
            new = draws.one_of(self._lexicon.families)
        return new.upper() if word.isupper() else new

    def _word(self, canonical: str, draws: Draws, attempt: int) -> str:
        """Made-up words with the letters of none."""
        words = []
        for word in canonical.split():
            if any(letter.isdigit() for letter in word):
                words.append(_alike(word, draws, attempt))
                continue
            count = max(2, len(word) // 2) + attempt // _LONGER
            words.append("".join(draws.one_of(SYLLABLES) for _ in range(min(count, 12))).capitalize())
        return " ".join(words)


_STREET_ENDINGS = (
    "straße", "strasse", "str.", "weg", "platz", "allee", "gasse", "ring", "damm", "ufer", "chaussee", "steig", "stieg",
    "markt", "graben", "promenade", "zeile", "pfad", "kamp", "twiete", "höhe", "berg", "garten",
)  # fmt: skip


def _style(surface: str) -> str:
    if surface.isupper() and len(surface) > 1:
        return "upper"
    if surface.islower():
        return "lower"
    return (
        "title" if all(part[:1].isupper() and part[1:] == part[1:].lower() for part in surface.split("-")) else "other"
    )


def _split(text: str) -> list[str]:
    """A text as words (with inner hyphens and full stops) and what is between them.

    >>> _split("Am Markt 5a, 12345 Ort")
    ['Am', ' ', 'Markt', ' ', '5a', ', ', '12345', ' ', 'Ort']
    """
    pieces: list[str] = []
    for letter in text:
        inner = letter.isalnum() or letter in "-.'\u2019"
        if pieces and (pieces[-1][-1].isalnum() or pieces[-1][-1] in "-.'\u2019") == inner:
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return pieces


def _alike(text: str, draws: Draws, attempt: int) -> str:
    """Digits for digits, letters for letters, in the same case; what is between them stays.

    A leading zero stays one, and what begins with another digit begins with another again.
    """
    made: list[str] = []
    before = ""
    for letter in text:
        if letter.isdigit():
            leads = not before.isdigit()
            if leads:
                made.append("0" if letter == "0" else str(1 + draws.below(9)))
            else:
                made.append(str(draws.below(10)))
        elif letter.isalpha():
            letters = string.ascii_uppercase if letter.isupper() else string.ascii_lowercase
            made.append(letters[draws.below(26)])
        else:
            made.append(letter)
        before = letter
    extra = min(attempt // _LONGER, 8)
    return "".join(made) + "".join(str(draws.below(10)) for _ in range(extra))


def _phone(canonical: str, draws: Draws, attempt: int) -> str:
    """A number of the same length; country code and leading zeros stay."""
    keep = 0
    if canonical.startswith("+"):
        keep = 2 if canonical[1:2] in "17" else 3
    elif canonical.startswith("00"):
        keep = 4
    elif canonical.startswith("0"):
        keep = 1
    head, rest = canonical[:keep], canonical[keep:]
    # Behind the country code no zero leads; the letter of an extension stays.
    number, letter, extension = rest.partition("X")
    return head + _alike("1" + number[1:], draws, attempt) + letter + _alike(extension, draws, 0)


def _ip(canonical: str, draws: Draws) -> str:
    if ":" in canonical:
        digits = "0123456789abcdef"
        return "".join(digits[draws.below(16)] if letter.isalnum() else letter for letter in canonical)
    first = (
        canonical.partition(".")[0] if canonical.startswith(("10.", "192.168.", "127.")) else str(11 + draws.below(110))
    )
    second = "168" if canonical.startswith("192.168.") else str(draws.below(256))
    return f"{first}.{second}.{draws.below(256)}.{1 + draws.below(254)}"


def _formatted(surface: str, base: str) -> str:
    """The letters and digits of `base` in the places that a surface has for them."""
    source = iter(base)
    made = [next(source, "") if letter.isalnum() or letter == "+" else letter for letter in surface]
    text = "".join(made) + "".join(source)
    return (
        "".join(new.lower() if old.islower() else new for old, new in zip(surface, text, strict=False))
        + text[len(surface) :]
    )
