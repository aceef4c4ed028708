"""Identifiers out, originals back: the same surrogate always, nobody's twice, and answers restored exactly."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsea.errors import StorageError
from fedsea.evaluation.notes.writer import write_notes
from fedsea.privacy.pseudonyms import vault as vault_module
from fedsea.privacy.pseudonyms.checksums import iban_valid, luhn_valid

NOTE = (
    "Herr Klaus Schmidt, geb. 12.03.1984, Hauptstraße 12a, 10115 Berlin, Tel. 030 901820, klaus.schmidt@web.de. "
    "SCHMIDT kam am 14.03.2024. Schmidts Frau Anna-Lena zahlte von DE89 3704 0044 0532 0130 00 mit "
    "4111 1111 1111 1111. Fallnr. 483920, Kennzeichen B-AB 1234, https://klinik-nord.de/p/123?x=a von 192.168.0.17, "
    "SSN 123-45-6789."
)
FORM = re.compile(
    r"Herr [A-ZÄÖÜ]\w+ [A-ZÄÖÜ]\w+, geb\. \d\d\.\d\d\.\d{4}, [A-ZÄÖÜ]\w+straße \d\d[a-z], \d{5} [A-ZÄÖÜ]\w+, "
    r"Tel\. 0\d\d \d{6}, [\w.]+@[\w.]+\. [A-ZÄÖÜ]+ kam am \d\d\.\d\d\.\d{4}\. [A-ZÄÖÜ]\w+s Frau "
    r"[A-ZÄÖÜ]\w+-[A-ZÄÖÜ]\w+ zahlte von (?P<iban>DE\d\d \d{4} \d{4} \d{4} \d{4} \d\d) mit "
    r"(?P<card>4\d{3} \d{4} \d{4} \d{4})\. Fallnr\. \d{6}, Kennzeichen [A-Z]-[A-Z]{2} \d{4}, "
    r"https://[\w.]+/[a-z]/\d{3}\?[a-z]=[a-z] von 192\.168\.\d+\.\d+, SSN \d{3}-\d\d-\d{4}\."
)
SECRETS = [
    *("Klaus", "Schmidt", "SCHMIDT", "Anna-Lena", "12.03.1984", "Hauptstraße", "10115", "901820", "klaus.schmidt"),
    *("3704", "4111", "483920", "1234", "klinik-nord", "192.168.0.17", "123-45-6789"),
]


def test_no_identifier_of_a_note_is_left_and_its_form_is_kept(opened):
    text = opened()([NOTE])[0]
    assert [secret for secret in SECRETS if secret in text] == []
    match = FORM.fullmatch(text)
    assert match, text
    assert iban_valid(match["iban"].replace(" ", ""))
    assert luhn_valid(match["card"].replace(" ", ""))


def test_the_same_identifier_has_the_same_surrogate_in_rows_prompts_and_later_processes(opened):
    first = opened()
    row = first(["Frau Berta Kowalski war da. Rückruf: 030 901820."])[0]
    prompt = first.prompt("Rückruf: 030 901820. Frau Berta Kowalski fragt nach.").text
    again = opened()(["Frau Berta Kowalski war da. Rückruf: 030 901820."])[0]
    assert again == row
    words = set(re.findall(r"\w+", row)) - {"Frau", "war", "da", "Rückruf", "030"}
    assert len(words) >= 3
    assert words <= set(re.findall(r"\w+", prompt))
    assert first.identity == opened().identity


def test_one_person_stays_one_in_capitals_and_with_a_genitive(opened):
    pseudonyms = opened()
    plain, capitals, genitive = pseudonyms(["Herr Schmidt kam.", "Herr SCHMIDT kam.", "Herr Schmidts Auto."])
    name = plain.split()[1]
    assert capitals.split()[1] == name.upper()
    assert genitive.split()[1] == f"{name}s"


def test_one_number_stays_one_however_it_is_grouped(opened):
    one, other = opened()(["Tel. 030 901820", "Tel. 030-90 18 20"])
    assert re.sub(r"\D", "", one) == re.sub(r"\D", "", other)


def test_dates_move_by_one_number_of_whole_weeks(opened):
    days = ["01.02.2020", "03.02.2020", "28.02.2021", "24.12.2023"]
    new = [dt.datetime.strptime(opened()([f"am {day} da"])[0][3:13], "%d.%m.%Y").date() for day in days]
    moved = {(there - dt.datetime.strptime(day, "%d.%m.%Y").date()).days for there, day in zip(new, days, strict=True)}
    assert len(moved) == 1
    assert min(moved) <= -26 * 7
    assert min(moved) % 7 == 0


def test_no_two_identifiers_share_a_surrogate_and_none_is_an_identifier_that_was_known(opened):
    pseudonyms = opened(patterns={"badge": r"B-\d\d"})
    notes = [note.text for note in write_notes(150, seed=5)]
    badges = [f"Badge B-{number:02d} ok" for number in range(60)]
    pseudonyms([*notes, *badges])
    entries = pseudonyms._table.entries
    surrogates = [s for entry in entries for s in entry.surfaces.values()]
    assert len(set(surrogates)) == len(surrogates) > 500
    known: set[str] = set()
    for entry in entries:  # in the order in which they were made
        if entry.kind != "date":
            assert entry.base.lower() not in known
        known |= {surface.lower() for surface in entry.surfaces}
    assert not any(surface == surrogate for entry in entries for surface, surrogate in entry.surfaces.items())


def test_an_exhausted_form_gives_longer_surrogates_instead_of_one_twice(opened):
    pseudonyms = opened(types=(), patterns={"ward": r"W\d"})
    text = " ".join(f"W{digit}" for digit in range(10))
    replaced = pseudonyms.prompt(text)
    assert len(set(replaced.surrogates)) == 10
    assert pseudonyms.restored(replaced.text) == text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_that_quote_a_note_are_restored_exactly_however_they_are_cut(opened, seed):
    pseudonyms, rng = opened(), random.Random(seed)
    for note in write_notes(60, seed=seed):
        replaced = pseudonyms.prompt(note.text)
        assert pseudonyms.restored(replaced.text) == note.text
        restorer, at, pieces = pseudonyms.restorer([replaced]), 0, []
        while at < len(replaced.text):
            step = rng.choice((1, 1, 2, 3, 7, 20))
            pieces.append(restorer.push(replaced.text[at : at + step]))
            at += step
        assert "".join([*pieces, restorer.finish()]) == note.text


def test_text_that_cannot_be_a_surrogate_is_not_held_back(opened):
    pseudonyms = opened()
    replaced = pseudonyms.prompt("Frau Anna Schmidt")
    restorer = pseudonyms.restorer()
    assert restorer.push("The weather is fine ") == "The weather is fine "
    surrogate = replaced.surrogates[1]
    assert restorer.push(surrogate[:2]) == ""
    assert restorer.push(surrogate[2:]) == ""  # it might be the beginning of a longer word
    assert restorer.push(" is") == "Schmidt is"


def test_a_surrogate_inside_a_longer_word_is_none(opened):
    pseudonyms = opened()
    _, name = pseudonyms.prompt("Frau Anna Schmidt").surrogates
    for longer in (f"{name}haus", f"{name}-{name}", f"x{name}", f"{name}_1"):
        assert pseudonyms.restored(longer) == longer
    assert pseudonyms.restored(f"({name}), {name.upper()}; {name}s!") == "(Schmidt), SCHMIDT; Schmidts!"


@pytest.mark.parametrize("restore", ["all", "prompt"])
def test_what_names_persons_and_places_is_restored_in_capitals_too(opened, restore):
    pseudonyms = opened(restore=restore, words=("Projekt Falke",))
    text = "Frau Anna Schmidt, anna.schmidt@web.de, Hauptstraße 12a, 10115 Berlin, Projekt Falke"
    replaced = pseudonyms.prompt(text)
    assert len(replaced.surrogates) == 6
    assert pseudonyms.restored(replaced.text.upper(), [replaced]) == text.upper()


def test_a_surrogate_that_stands_in_a_prompt_by_nature_comes_back_as_it_was(opened):
    pseudonyms = opened(patterns={"badge": r"B-\d{4}"})
    first = pseudonyms.prompt("Frau Anna Schmidt, Badge B-1234, Fallnr. 483920, am 12.03.1984")
    stray = " ".join(first.surrogates)
    record = first.surrogates[3]
    text = f"Frau Schmidt traf {stray}; {record} Thrombozyten; {record.lower()} {record}."
    again = pseudonyms.prompt(text)
    assert pseudonyms.restored(again.text) == text
    assert not set(first.surrogates[:3]) & set(re.findall(r"[\w-]+", again.text.replace(again.surrogates[0], "")))


@pytest.mark.parametrize("seed", range(4))
def test_any_text_made_of_names_numbers_and_surrogates_is_restored_exactly(opened, seed):
    pseudonyms, rng, changed = opened(), random.Random(seed), 0
    given_out = pseudonyms.prompt(NOTE).surrogates
    parts = [*given_out, "Anna", "Schmidt", "Tel. 030 901820", "12.03.1984", *"-- .s4ß", "und", " ", " "]
    parts += [*(one.upper() for one in given_out[:6]), "Anna\u2011Lena", "\u2011", "\u2013", "\u00a0"]
    for _ in range(120):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 14)))
        replaced = pseudonyms.prompt(text)
        changed += replaced.text != text
        cuts = sorted(rng.randrange(len(replaced.text) + 1) for _ in range(6))
        restorer = pseudonyms.restorer()
        pieces = [restorer.push(replaced.text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(replaced.text)])]
        assert "".join([*pieces, restorer.finish()]) == text
    assert changed > 60


def test_restoring_the_prompts_own_surrogates_alone_leaves_others(opened):
    pseudonyms = opened(restore="prompt")
    other = pseudonyms.prompt("Frau Berta Kowalski").surrogates[1]
    mine = pseudonyms.prompt("Frau Anna Schmidt")
    assert pseudonyms.restored(f"{mine.surrogates[1]} {other}", [mine]) == f"Schmidt {other}"
    assert opened(restore="all").restored(f"{mine.surrogates[1]} {other}") == "Schmidt Kowalski"


def test_own_words_names_and_exceptions_count(opened, tmp_path: Path):
    (tmp_path / "staff.txt").write_text("# staff\nXiu Qwerty\n", encoding="utf-8")
    pseudonyms = opened(words=("Projekt Falke",), name_files=("staff.txt",), keep=("Anna Seghers",))
    text = pseudonyms(["qwerty las Anna Seghers für projekt  falke und Frau Anna Schmidt."])[0]
    assert "Anna Seghers" in text
    assert not re.search("qwerty|falke|schmidt|Frau Anna", text, re.IGNORECASE)


def test_two_processes_on_one_mapping_give_one_surrogate_to_one_identifier(opened, tmp_path: Path):
    pseudonyms = opened()
    program = (
        "import json, sys; from pathlib import Path\n"
        "from fedsea.plan.pseudonyms import PseudonymSettings\n"
        "from fedsea.privacy.pseudonyms import open_pseudonyms\n"
        "p = open_pseudonyms(PseudonymSettings(enabled=True), Path(sys.argv[1]), 'clinic')\n"
        "texts = [f'Herr Zz{chr(97 + n)}{k}q kam' for n in range(12) for k in 'xyz']\n"
        "out = [p([text])[0] for text in texts]\n"
        "print(json.dumps(out))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [json.loads(other.communicate(timeout=60)[0]) for other in others]
    assert outs[0] == outs[1]
    assert len(set(outs[0])) == 36
    names = [f"Herr Zz{chr(97 + n)}{k}q kam" for n in range(12) for k in "xyz"]
    assert pseudonyms(names) == outs[0]
    assert [pseudonyms.restored(text) for text in outs[0]] == names


def test_a_full_disk_gives_nothing_out_and_forgets_what_was_not_written(opened, monkeypatch):
    pseudonyms = opened()
    before = pseudonyms(["Frau Anna Schmidt"])

    def full(*_):
        raise StorageError("The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(vault_module, "write_bytes_atomic", full)
        with pytest.raises(StorageError, match="full"):
            pseudonyms(["Herr Bertold Kowalski"])
        assert pseudonyms(["Frau Anna Schmidt"]) == before
    assert pseudonyms.num_entries == opened().num_entries == 2
    assert pseudonyms(["Herr Bertold Kowalski"]) == opened()(["Herr Bertold Kowalski"])
