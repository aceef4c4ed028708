"""Notes of made-up people, with the place of everything that was planted."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fedsea.evaluation.notes.identifiers import Identifiers
from fedsea.evaluation.notes.templates import ENGLISH, ENGLISH_PLAIN, GERMAN, GERMAN_PLAIN

_FIELD = re.compile(r"\[([a-z_.]+)\]")
_SENTENCES = {"de": (GERMAN, GERMAN_PLAIN), "en": (ENGLISH, ENGLISH_PLAIN)}


@dataclass(frozen=True, slots=True)
class Plant:
    """An identifier in a note.

    Attributes:
        start: Its first letter.
        end: Behind its last letter.
        kind: Its type, as in the settings.
        form: Which form of it; for names, also whether a list has them.
    """

    start: int
    end: int
    kind: str
    form: str


@dataclass(frozen=True, slots=True)
class Note:
    """A note.

    Attributes:
        language: "de" or "en".
        plants: In order.
    """

    text: str
    language: str
    plants: tuple[Plant, ...]

    def planted(self) -> Iterator[tuple[Plant, str]]:
        """Every plant with its text."""
        return ((plant, self.text[plant.start : plant.end]) for plant in self.plants)


def write_notes(count: int, seed: int = 0, languages: tuple[str, ...] = ("de", "en")) -> list[Note]:
    """Notes, each about one person, of four to seven sentences, about a third of them without an identifier.

    Args:
        count: How many; languages take turns.
        seed: The same one gives the same notes (with the same version of Faker).
        languages: Of the notes.
    """
    rng = random.Random(seed)  # noqa: S311 (test data)
    sources = {language: Identifiers(language, seed) for language in languages}
    return [
        _note(rng, language, sources[language]) for language in (languages[n % len(languages)] for n in range(count))
    ]


def _note(rng: random.Random, language: str, source: Identifiers) -> Note:
    planted, plain = _SENTENCES[language]
    person = source.person()
    text = ""
    plants: list[Plant] = []
    for number in range(rng.randrange(4, 8)):
        sentence = rng.choice(plain) if rng.random() < 0.35 else rng.choice(planted)
        text += rng.choice((" ", " ", "\n")) if number else ""
        at = 0
        for field in _FIELD.finditer(sentence):
            text += sentence[at : field.start()]
            for part, kind in source.make(field[1], person):
                if kind:
                    form = field[1].partition(".")[2]
                    about = f"{form}, {person.known}" if kind == "name" else form
                    plants.append(Plant(len(text), len(text) + len(part), kind, about))
                text += part
            at = field.end()
        text += sentence[at:]
    return Note(text, language, tuple(plants))
