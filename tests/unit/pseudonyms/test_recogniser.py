"""What is taken for an identifier, and what is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedsea.errors import ConfigError
from fedsea.evaluation.notes.recall import measure
from fedsea.evaluation.notes.writer import write_notes
from fedsea.plan.pseudonyms import IDENTIFIER_TYPES, PseudonymSettings
from fedsea.privacy.pseudonyms.dates import shifted
from fedsea.privacy.pseudonyms.recogniser import Recogniser


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(PseudonymSettings(), Path())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Herr Dr. med. Xhemil Qerimi kam.", ["Xhemil", "Qerimi"]),
        ("PATIENT: DE JODE, MIRTE", ["JODE", "MIRTE"]),
        ("Qerimi, Xhemil, geb. 1.2.1960", ["Qerimi", "Xhemil", "1.2.1960"]),
        ("Mr. J. K. Rowbotham said. Rowbotham left.", ["Rowbotham", "Rowbotham"]),
        ("Sincerely,\nQerim Xhaka", ["Qerim", "Xhaka"]),
        ("Call (212) 555-0198 x12 or +44 20 7946 0958.", ["(212) 555-0198 x12", "+44 20 7946 0958"]),
        ("Tel.: 0171/2345678", ["0171/2345678"]),
        ("742 Evergreen Terrace Apt. 5, Springfield, IL 62704-1234", None),
        ("Am Alten Markt 5, D-10115 Berlin", ["Am Alten Markt 5", "D-10115 Berlin"]),
        ("10 Downing Street, London SW1A 2AA", ["10 Downing Street", "London SW1A 2AA"]),
        ("3rd of May 2021, 2021-05-03T10:15, 03-MAY-2021", ["3rd of May 2021", "2021-05-03T10:15", "03-MAY-2021"]),
        ("vom 01.02. bis zum 3. März", ["01.02.", "3. März"]),
        ("MRN 00-48/29.", ["00-48/29"]),
        ("Visit http://a.b/c?d=e. Or mail x.y+z@sub.example.co.uk!", ["http://a.b/c?d=e", "x.y+z@sub.example.co.uk"]),
        ("from fe80::1ff:fe23:4567:890a and 10.0.0.7", ["fe80::1ff:fe23:4567:890a", "10.0.0.7"]),
        ("Steuer-ID: 12 345 678 901", ["12 345 678 901"]),
        ("65 150870 M 003", ["65 150870 M 003"]),
        ("Kennzeichen: HH XY 99", ["HH XY 99"]),
        ("Geb. 3.4.80, born on 3/4/80; am 3.4.80.", ["3.4.80", "3/4/80", "3.4.80"]),
        ("ID: 12345678, ID-Nr. AB-1234, id=00-48/29.", ["12345678", "AB-1234", "00-48/29"]),
        ("IBAN de89 3704 0044 0532 0130 00 bank", ["de89 3704 0044 0532 0130 00"]),
        ("IBAN at61 1904 3002 3457 3201 bitte, de89370400440532013000", ["at61 1904 3002 3457 3201",
                                                                        "de89370400440532013000"]),
        ("passport no. c01x00t47, Reisepass l01x00t471", ["c01x00t47", "l01x00t471"]),
        ("Az. 12 Js 345/21, Aktenzeichen: IV 2 C 123/20.", ["12 Js 345/21", "IV 2 C 123/20"]),
        ("Case number 4471 1234 was closed, MRN 447 112 345.", ["4471 1234", "447 112 345"]),
        ("MRN 4471 500 mg, 10115 Berlin", ["4471", "10115 Berlin"]),
        ("3 Apr 80 and 5. Mai '81, 03-Apr-80; am 3. Mai 12 mg", ["3 Apr 80", "5. Mai '81", "03-Apr-80", "3. Mai"]),
        ('"anna schmidt"@clinic.org said "hello" to a@b.de', ['"anna schmidt"@clinic.org', "a@b.de"]),
        ("He lives in Boise, ID 83702", ["Boise, ID 83702"]),
        ("file:///srv/anna/x.txt, smb://nas/anna, wss://a/b", ["file:///srv/anna/x.txt", "smb://nas/anna", "wss://a/b"]),
        ("(klinik.de/anna-schmidt) a.klinik.org:80?x=1.", ["klinik.de/anna-schmidt", "a.klinik.org:80?x=1"]),
        ("an anna.schmidt@[10.0.0.1] senden", ["anna.schmidt@[10.0.0.1]"]),
        ("Siehe https://a.org/o'neil/anna, 'http://b.org/x'.", ["https://a.org/o'neil/anna", "http://b.org/x"]),
    ],
)  # fmt: skip
def test_identifiers_are_found_from_their_first_letter_to_their_last(recogniser, text, found):
    spans = [text[span.start : span.end] for span in recogniser.find(text)]
    assert (spans if found is not None else [", ".join(spans)]) == (found or [text])


@pytest.mark.parametrize(
    "text",
    [
        "Leukozyten 12345/µl, Blutdruck 120/80, HLA-B27, HLA-B 27, J45.9, 5,2 mg, Version 1.2.3.",
        "Der Weber-Test, Morbus Parkinson und das Babinski-Zeichen im Winter.",
        "Will May come in March? The Ward round is in the Green Room.",
        "Es waren 1000 Einheiten in 30 Tagen, 3 von 4, um 12:30 Uhr.",
        "He took 4111 1111 1111 1112 steps and 1234567890123 more.",
        "Seite 12 von 30; 5 St. Tabletten; 100 %.",
        "im12 jahr 2020 1234, passport control by the officer, Az. im Amt, Aktenzeichen folgt; Sample number unclear.",
        "Abschnitt 3.4.80, Version 1.2.30, am 3.14.80, ID: 7, an idea: 12345, z.B. und/oder.de ja/nein, self.net / 2.",
    ],
)
def test_ordinary_text_is_left_as_it_is(recogniser, text):
    assert [text[span.start : span.end] for span in recogniser.find(text)] == []


def test_each_type_can_be_left_out():
    text = "Frau Anna Schmidt, am 12.03.1984, Tel. 030 901820, a@b.de"
    for kind in ("name", "date", "phone", "email"):
        types = tuple(one for one in IDENTIFIER_TYPES if one != kind)
        kinds = {span.kind for span in Recogniser(PseudonymSettings(types=types), Path()).find(text)}
        assert kinds == {"name", "date", "phone", "email"} - {kind}


def test_what_is_found_depends_on_the_text_alone(recogniser):
    notes = [note.text for note in write_notes(40)]
    first = [recogniser.find(note) for note in notes]
    assert [recogniser.find(note) for note in reversed(notes)] == first[::-1]


def test_identities_differ_with_what_is_looked_for():
    one = PseudonymSettings()
    others = [
        one.model_copy(update=update) for update in ({"types": ("name",)}, {"words": ("Falke",)}, {"keep": ("x1",)})
    ]
    identities = {Recogniser(settings, Path()).identity for settings in (one, *others)}
    assert len(identities) == 4
    assert Recogniser(PseudonymSettings(mapping="elsewhere"), Path()).identity in identities


def test_word_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.txt of \[pseudonyms\] cannot be read"):
        Recogniser(PseudonymSettings(word_files=("absent.txt",)), tmp_path)
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(ConfigError, match="no UTF-8"):
        Recogniser(PseudonymSettings(name_files=("latin.txt",)), tmp_path)


def test_recall_on_generated_notes_stays_where_it_is(recogniser):
    scores = {kind: one.to_dict() for kind, one in measure(write_notes(300, seed=7), recogniser.find).items()}
    least = {"name": 0.8, "address": 0.97}
    short = {kind: one["recall"] for kind, one in scores.items() if one["recall"] < least.get(kind, 0.9)}
    assert short == {}
    assert scores["all"]["recall"] > 0.9
    assert scores["all"]["precision"] > 0.98


def test_hostile_text_takes_no_more_than_its_length(recogniser):
    texts = ["1" * 10_000, "A" * 10_000, "a.b@" * 5_000, "Dr. " * 5_000, "1 " * 10_000, "Anna-" * 2_000, "x:" * 10_000,
             "12.12.20" * 2_000, "Aa " * 7_000, "-" * 10_000, "+49 " * 5_000, "Am Am " * 3_000,
             "1-" * 9_000, "A1 " * 7_000, "MRN " * 5_000, "a." * 9_000, "a.de/" * 4_000, "ID: " * 5_000,
             "ID:a." * 4_000, "ID:" + "a" * 10_000, "am 1.1." * 3_000, "a@[" * 5_000, "http://" * 3_000,
             '"a' * 5_000, "Az. 1 " * 5_000, "MRN 12 " * 3_000, "MRN 12" + " 123" * 5_000,
             "file://'a" * 2_000, "1\u2013" * 7_000, "1 \u2013 " * 4_000, "Aa  " * 5_000, "A1  " * 5_000,
             "1111  " * 3_000]  # fmt: skip
    began = time.process_time()
    for text in texts:
        recogniser.find(text)
    assert time.process_time() - began < 15.0


@pytest.mark.parametrize("word", ["tel", "SSN", "MRN", "passport", "kennzeichen"])
def test_a_long_gap_behind_a_word_that_announces_a_number_costs_little(recogniser, word):
    gap = " " * 3000
    began = time.process_time()
    recogniser.find(f"1 {word}{gap}? {word} ist{gap}:{gap}?")
    assert time.process_time() - began < 5.0


def test_shifting_there_and_back_gives_the_same_date():
    for text in ("28.02.1984", "1984-02-29", "March 3, 2021", "1. Mai 2020", "3-Mar-2020", "29. Februar", "3 Apr 80"):
        moved = shifted(text, -371)
        assert moved is not None
        assert moved != text
        assert shifted(moved, 371) == text
    assert shifted("no date", 7) is None
    assert shifted("30.02.2020", 7) is None
