"""Typographic blanks and dashes hide no identifier, and what was written with them comes back as it was."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from fedsea.evaluation.notes.writer import write_notes
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms.recogniser import Recogniser
from fedsea.privacy.pseudonyms.typography import even, joined, plain

IDENTIFIERS = [
    "Tel. 030 1234567",
    "Tel. 0171-1234567",
    "call 415-555-2671",
    "+49 171 1234567",
    "IBAN DE89 3704 0044 0532 0130 00",
    "Karte 4111 1111 1111 1111",
    "geb. 3. April 1980",
    "born April 3, 1980",
    "born 1980-04-03",
    "3-Apr-1980",
    "SSN 123-45-6789",
    "Hauptstraße 12, 10115 Berlin",
    "12 Main Street, Springfield, IL 62704",
    "Frau Anna Schmidt",
    "Frau Anna Schmidt-Kowalczewska",
    "Mr. John Miller",
    "65 150870 M 003",
    "B-MW 1234",
]
BLANKS = ["\u00a0", "\u202f", "\u2009", "\u3000", "  "]
HYPHENS = ["\u2010", "\u2011", "\u2012", "\u2013", "\u2212"]
WRITINGS = [*itertools.product([" "], BLANKS), *itertools.product(["-"], HYPHENS)]


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(PseudonymSettings(), Path())


def surfaces(recogniser: Recogniser, text: str) -> list[str]:
    return [text[span.start : span.end] for span in recogniser.find(text)]


@pytest.mark.parametrize("text", IDENTIFIERS)
def test_an_identifier_is_found_whole_with_typographic_blanks_and_dashes(recogniser, text):
    ordinary = surfaces(recogniser, text)
    assert ordinary
    for old, new in WRITINGS:
        written = text.replace(old, new)
        assert surfaces(recogniser, written) == [one.replace(old, new) for one in ordinary], ascii(written)


def test_dashes_between_numbers_dates_and_words_join_nothing(recogniser):
    for text, found in (
        ("vom 03.04.1980\u201305.04.1980", ["03.04.1980", "05.04.1980"]),
        ("2020-01-01\u20132020-02-01", ["2020-01-01", "2020-02-01"]),
        ("call 415-555-2671\u2014he waits", ["415-555-2671"]),
        ("Frau Anna Schmidt\u2014die Nachbarin\u2014kam", ["Anna", "Schmidt"]),
        ("MRN 4471123\u2013stabil \u2013 und Frau Schmidt", ["4471123", "Schmidt"]),
        ("Werte 120\u2013140, 5\u202f%, 10\u00a0mg \u2013 12\u00a0Uhr", []),
    ):
        assert surfaces(recogniser, text) == found


def test_own_words_patterns_names_and_exceptions_count_however_they_are_written(tmp_path):
    (tmp_path / "names.txt").write_text("Xiu\u00a0Qwer\u2011Ty\n", encoding="utf-8")
    settings = PseudonymSettings(
        words=("Projekt Falke", "Haus\u00a0Linde-Nord"),
        patterns={"badge": r"B-\d{5}", "odd": "Z\u2011\\d"},
        keep=("Anna Seghers",),
        name_files=("names.txt",),
    )
    text = (
        "Projekt\u00a0Falke, Haus Linde\u2011Nord, B\u201112345, B\u201354321, Z\u20115, Anna\u202fSeghers, "
        "xiu qwer\u2010ty"
    )
    assert surfaces(Recogniser(settings, tmp_path), text) == [
        *("Projekt\u00a0Falke", "Haus Linde\u2011Nord", "B\u201112345", "B\u201354321", "Z\u20115"),
        *("xiu", "qwer\u2010ty"),
    ]


def test_surrogates_keep_typographic_blanks_and_dashes_and_come_back_as_they_were(opened):
    pseudonyms = opened()
    for text, (old, new) in itertools.product(IDENTIFIERS, WRITINGS):
        written = text.replace(old, new)
        replaced = pseudonyms.prompt(written)
        assert pseudonyms.restored(replaced.text) == written
        between = [letter for letter in replaced.text if not letter.isalnum()]
        assert between == [letter for letter in written if not letter.isalnum()]


def test_one_number_and_one_name_stay_one_and_may_be_answered_with_ordinary_letters(opened):
    pseudonyms = opened()
    replaced = pseudonyms.prompt("Frau Anna\u2011Lena Schmidt, Tel. 0171\u20111234\u00a0567")
    assert plain(replaced.text) == pseudonyms(["Frau Anna-Lena Schmidt, Tel. 0171-1234 567"])[0]
    fresh = pseudonyms.prompt("Tel. 0160\u2011998\u00a0877")
    assert pseudonyms.restored(plain(fresh.text)) == "Tel. 0160-998 877"


@pytest.mark.parametrize("seed", [0, 1])
def test_notes_in_typographic_letters_come_back_however_they_are_cut(opened, seed):
    pseudonyms, rng = opened(), random.Random(seed)
    choices = {" ": [" ", *BLANKS], "-": ["-", "\u2014", *HYPHENS]}
    for note in write_notes(30, seed=seed):
        text = "".join(rng.choice(choices.get(letter, [letter])) for letter in note.text)
        replaced = pseudonyms.prompt(text)
        cuts = sorted(rng.randrange(len(replaced.text) + 1) for _ in range(60))
        restorer = pseudonyms.restorer()
        pieces = [restorer.push(replaced.text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(replaced.text)])]
        assert "".join([*pieces, restorer.finish()]) == text


def test_copies_have_the_length_of_the_text():
    text = "".join(map(chr, range(0x20, 0x3100))) + "\uff0d\ufe63\ufe58"
    assert len(plain(text)) == len(even(text)) == len(joined(text)) == len(text)
