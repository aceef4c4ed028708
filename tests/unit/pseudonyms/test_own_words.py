"""The client's own words, patterns and exceptions: they never let out what is found without them."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest

from fedsea.evaluation.notes.writer import write_notes
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms.recogniser import Recogniser
from fedsea.privacy.pseudonyms.spans import joins


def _found(text: str, **settings) -> list[tuple[str, str]]:
    spans = Recogniser(PseudonymSettings(**settings), Path()).find(text)
    return [(span.kind, text[span.start : span.end]) for span in spans]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Mail an anna.schmidt@hospital.org.", [("email", "anna.schmidt@hospital.org")]),
        ("https://hospital.org/p/schmidt/anna-1980", [("url", "https://hospital.org/p/schmidt/anna-1980")]),
        ("Schmidtweg 5, schmidt", [("address", "Schmidtweg 5"), ("word", "schmidt")]),
        ("Am Schmidt 5", [("address", "Am Schmidt 5")]),
        ("mail anna.B1234@hospital.org, B1234", [("email", "anna.B1234@hospital.org"), ("pattern:badge", "B1234")]),
        ("In Haus Linde 5", [("word", "Haus Linde")]),
        ("Haus Am Markt 5", [("address", "Haus Am Markt 5")]),
        ("Das Haus anna@web.de kam", [("email", "Das Haus anna@web.de")]),
        ("an anna.schmidt@klinik", [("pattern:intranet", "anna.schmidt@klinik")]),
        ("haus linde", [("word", "haus linde")]),
    ],
)
def test_what_holds_an_own_word_or_is_cut_by_one_is_replaced_whole(text, found):
    words = ("schmidt", "Haus Linde", "Haus Am", "Das Haus anna")
    patterns = {"badge": r"B\d{4}", "intranet": r"[\w.]+@klinik", "wards": "haus linde"}
    assert _found(text, words=words, patterns=patterns) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Mail an anna.schmidt@berlin.de bitte.", ["anna.schmidt@berlin.de"]),
        ("Siehe https://www.berlin.de/patient/anna-schmidt", ["https://www.berlin.de/patient/anna-schmidt"]),
        ("Wohnt in 10115 Berlin", ["10115 Berlin"]),
        ("Herr Anna Schmidt-Berlin kam.", ["Anna", "Schmidt-Berlin"]),
        ("Sie las Anna Seghers in Berlin.", []),
    ],
)
def test_a_kept_word_keeps_only_what_it_covers(text, found):
    assert [surface for _, surface in _found(text, keep=("Berlin", "Anna Seghers"))] == found


@pytest.mark.parametrize("seed", range(3))
def test_own_words_and_patterns_only_add_to_what_is_covered(seed):
    rng = random.Random(seed)
    for note in write_notes(12, seed=seed):
        text, places = note.text, [at for at in range(len(note.text) + 1) if not joins(note.text, at)]
        words = []
        for _ in range(12):
            start = rng.randrange(len(places) - 1)
            phrase = text[places[start] : places[min(start + rng.randrange(1, 6), len(places) - 1)]].strip()
            if len(phrase) > 1 and phrase[0].isalnum():
                words.append(phrase)
        before = {at for span in Recogniser(PseudonymSettings(), Path()).find(text) for at in _letters(span)}
        own = PseudonymSettings(words=tuple(words), patterns={"part": r"[a-k]+\d*", "two": r"\d\d"})
        spans = Recogniser(own, Path()).find(text)
        after = {at for span in spans for at in _letters(span)}
        assert before <= after
        assert all(one.end <= other.start for one, other in itertools.pairwise(spans))
        assert not any(joins(text, at) for span in spans for at in (span.start, span.end))


def _letters(span) -> range:
    return range(span.start, span.end)


def test_texts_with_own_words_inside_other_identifiers_come_back(opened):
    pseudonyms = opened(
        words=("schmidt", "Das Haus anna", "Xyzzy", "Xyzzy DE89", "5, 10115"),
        patterns={"two": r"\d\d"},
        keep=("Berlin",),
    )
    text = (
        "Das Haus anna@web.de, schmidt@web.de, Frau Schmidt, Hauptstraße 5, 10115 Berlin, Tel. 030 901820, "
        "am 12.03.1984, IBAN Xyzzy DE89 3704 0044 0532 0130 00, https://berlin.de/schmidt von 192.168.0.17"
    )
    replaced = pseudonyms.prompt(text)
    assert pseudonyms.restored(replaced.text) == text
    assert not re.search("anna|xy|schmidt|haus|10115|901820|1984|3704", replaced.text, re.IGNORECASE)
