"""Made-up identifiers, drawn with a seed: names that the recogniser's lists have, names that they lack, and the rest.

Names come from Faker's lists of many countries. The recogniser knows the German and English ones, so the others stand
for people whose names no list has: half of all people here.
"""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import dataclass

from faker import Faker

from fedsea.privacy.pseudonyms.lexicon import Lexicon, load_lexicon

_KNOWN = {"de": ("de_DE", "de_AT"), "en": ("en_US", "en_GB")}
_FOREIGN = ("nl_NL", "sv_SE", "tr_TR", "it_IT", "fr_FR", "es_ES", "fi_FI", "pl_PL")
_MONTHS = {
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split(),  # noqa: SIM905
    "en": "January February March April May June July August September October November December".split(),  # noqa: SIM905
}


@dataclass(frozen=True, slots=True)
class Person:
    """Whom a note is about.

    Attributes:
        known: "known" if the recogniser's lists have both names, "unknown" if they have neither, else "partly".
    """

    first: str
    last: str
    known: str


class Identifiers:
    """Draws identifiers.

    Args:
        language: Of addresses, dates and phone numbers.
        seed: The same one draws the same.
    """

    def __init__(self, language: str, seed: int) -> None:
        self._language = language
        self._random = random.Random(seed)  # noqa: S311 (test data)
        self._lexicon: Lexicon = load_lexicon(("de", "en"))
        self._known = [self._faker(locale, seed) for locale in _KNOWN[language]]
        self._foreign = [self._faker(locale, seed) for locale in _FOREIGN]
        self._here = self._known[0]

    @staticmethod
    def _faker(locale: str, seed: int) -> Faker:
        faker = Faker(locale)
        faker.seed_instance(seed)
        return faker

    def person(self) -> Person:
        """Somebody new."""
        fakers = self._foreign if self._random.random() < 0.5 else self._known
        faker = self._random.choice(fakers)
        first, last = faker.first_name(), faker.last_name()
        parts = (first.lower() in self._lexicon.first, last.lower() in self._lexicon.last)
        return Person(first, last, "known" if all(parts) else "partly" if any(parts) else "unknown")

    def make(self, field: str, person: Person) -> list[tuple[str, str]]:
        """What fills a field, as parts of text and type; "" is no identifier."""
        kind, _, form = field.partition(".")
        if kind == "name":
            return self._name(form, person)
        return [(getattr(self, f"_{kind}")(form), kind)]

    def _name(self, form: str, person: Person) -> list[tuple[str, str]]:
        first, last, kind = person.first, person.last, "name"
        match form:
            case "full":
                return [(first, kind), (" ", ""), (last, kind)]
            case "last_first":
                return [(last, kind), (", ", ""), (first, kind)]
            case "capitals":
                return [(last.upper(), kind), (", ", ""), (first.upper(), kind)]
            case "lower":
                return [(last.lower(), kind)]
            case "genitive":
                return [(last if last.endswith("s") else f"{last}s", kind)]
            case "possessive":
                return [(last, kind), ("'s", "")]
            case _:
                return [(getattr(person, form), kind)]

    def _date(self, form: str) -> str:
        rng = self._random
        day = dt.date(1935, 1, 1) + dt.timedelta(rng.randrange(32800))
        month = _MONTHS[self._language][day.month - 1]
        german = self._language == "de"
        match form:
            case "numeric" if german:
                return (
                    day.strftime(rng.choice(("%d.%m.%Y", "%d.%m.%y")))
                    if rng.random() < 0.8
                    else (f"{day.day}.{day.month}.{day.year}")
                )
            case "numeric":
                return day.strftime(rng.choice(("%m/%d/%Y", "%m/%d/%y", "%m-%d-%Y")))
            case "words":
                return str(
                    f"{day.day}. {month} {day.year}"
                    if german
                    else rng.choice(
                        (
                            f"{month} {day.day}, {day.year}",
                            f"{day.day} {month} {day.year}",
                            f"{month[:3]} {day.day}, {day.year}",
                        )
                    )
                )
            case "partial":
                return f"{day.day}. {month}" if german else f"{month} {day.day}"
            case _:
                return day.isoformat()

    def _address(self, form: str) -> str:
        if form == "street":
            return str(self._here.street_address()).replace("\n", ", ")
        if self._language == "de":
            return f"{self._here.postcode()} {self._here.city()}"
        return f"{self._here.city()}, {self._here.state_abbr()} {self._here.postcode()}"

    def _phone(self, _form: str) -> str:
        return str(self._here.phone_number())

    def _email(self, _form: str) -> str:
        return str(self._here.email() if self._random.random() < 0.7 else self._here.company_email())

    def _url(self, _form: str) -> str:
        return f"{self._here.url()}{self._here.uri_path()}"

    def _ip(self, _form: str) -> str:
        return str(self._here.ipv4() if self._random.random() < 0.8 else self._here.ipv6())

    def _iban(self, _form: str) -> str:
        iban = str(self._here.iban())
        return " ".join(iban[at : at + 4] for at in range(0, len(iban), 4)) if self._random.random() < 0.5 else iban

    def _card(self, _form: str) -> str:
        number = str(self._here.credit_card_number("visa16"))
        return " ".join(number[at : at + 4] for at in range(0, 16, 4)) if self._random.random() < 0.5 else number

    def _ssn(self, form: str) -> str:
        if self._language == "en":
            return str(self._here.ssn())
        day = dt.date(1940, 1, 1) + dt.timedelta(self._random.randrange(25000))
        if form == "sv":
            return f"{self._random.randrange(10, 90)} {day:%d%m%y} {self._letter()} {self._random.randrange(1000):03d}"
        return f"{self._letter()}{self._random.randrange(10**9):09d}"

    def _record(self, _form: str) -> str:
        rng = self._random
        return rng.choice(
            (f"{rng.randrange(10**8):08d}", f"{rng.randrange(10**5, 10**6)}",
             f"{self._letter()}-{rng.randrange(10**5):05d}", f"20{rng.randrange(18, 26)}/{rng.randrange(10**4):04d}")
        )  # fmt: skip

    def _passport(self, _form: str) -> str:
        return "".join(self._random.choice("CFGHJKLMNPRTVWXYZ0123456789") for _ in range(8)) + str(
            self._random.randrange(10)
        )

    def _plate(self, form: str) -> str:
        rng = self._random
        if form == "us":
            return rng.choice((f"{rng.randrange(1, 9)}{self._letters(3)}{rng.randrange(1000):03d}",
                               f"{self._letters(3)}-{rng.randrange(10**4):04d}"))  # fmt: skip
        return f"{self._letters(rng.randrange(1, 4))}-{self._letters(rng.randrange(1, 3))} {rng.randrange(1, 9999)}"

    def _letter(self) -> str:
        return self._letters(1)

    def _letters(self, count: int) -> str:
        return "".join(self._random.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(count))
