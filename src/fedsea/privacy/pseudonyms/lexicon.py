"""Word lists: names that are known, and from which surrogates are drawn. They are Faker's (MIT licence)."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedsea.errors import ConfigError
from fedsea.privacy.pseudonyms.words import AMBIGUOUS

_LOCALES = {"de": ("de_DE", "de_AT", "de_CH"), "en": ("en_US", "en_GB")}


_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "é": "e", "è": "e", "á": "a", "à": "a"})


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Names of some languages.

    Attributes:
        first: First names, in lower case.
        female: Those of them that only women have.
        last: Last names, in lower case.
        cities: Towns, in lower case.
        streets: Words that end the name of a street, in English.
        women: Surrogates for women's first names.
        men: Surrogates for men's first names, and for those of either.
        families: Surrogates for last names.
        towns: Surrogates for towns.
        sha256: What identifies the lists.
    """

    first: frozenset[str]
    female: frozenset[str]
    last: frozenset[str]
    cities: frozenset[str]
    streets: frozenset[str]
    women: Sequence[str]
    men: Sequence[str]
    families: Sequence[str]
    towns: Sequence[str]
    sha256: str

    def plain(self, name: str) -> str:
        """A name as it is written in addresses of the net."""
        return "".join(letter for letter in name.lower().translate(_UMLAUTS) if letter.isascii() and letter.isalnum())


@lru_cache(maxsize=4)
def load_lexicon(languages: tuple[str, ...]) -> Lexicon:
    """The lists of some languages.

    Raises:
        ConfigError: Faker is not installed.
    """
    people, places = [], []
    for locale in (name for language in languages for name in _LOCALES[language]):
        people.append(_provider("person", locale))
        places.append(_provider("address", locale))
    first = {name for one in people for name in one.first_names}
    female = {name for one in people for name in one.first_names_female}
    male = {name for one in people for name in one.first_names_male}
    last = {name for one in people for name in one.last_names}
    towns = {str(town) for one in places for town in getattr(one, "cities", ())}
    families = _pool(last)
    if "en" in languages:  # Faker has no American towns, it makes them up like this
        towns |= {f"{name}{ending}" for name in families[::7] for ending in ("ville", "ton", "burgh")}
    streets = {str(word) for one in places for word in getattr(one, "street_suffixes", ()) if str(word).isalpha()}
    lists = (_pool(female - male), _pool(male), families, sorted(town for town in towns if town.isalpha()))
    digest = hashlib.sha256(repr((lists, sorted(first), sorted(last), sorted(AMBIGUOUS))).encode())
    return Lexicon(
        frozenset(_lower(first)), frozenset(_lower(female - male)), frozenset(_lower(last)), frozenset(_lower(towns)),
        frozenset(word for word in streets if word[0].isupper()),
        *lists, digest.hexdigest(),
    )  # fmt: skip


def _lower(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names if len(name) > 2 and "." not in name and " " not in name}


def _pool(names: Iterable[str]) -> list[str]:
    """Names that a surrogate may have: one plain word, no word of a language, recognised wherever it stands."""
    return sorted(
        name for name in names if len(name) > 3 and name.isalpha() and name.istitle() and name.lower() not in AMBIGUOUS
    )


def _provider(kind: str, locale: str) -> Any:
    try:
        return importlib.import_module(f"faker.providers.{kind}.{locale}").Provider
    except ModuleNotFoundError:
        raise missing() from None


def missing() -> ConfigError:
    """Packages that pseudonyms need are not there."""
    return ConfigError('Pseudonyms need more packages: pip install ".[pseudonyms]" in the folder of the source.')
