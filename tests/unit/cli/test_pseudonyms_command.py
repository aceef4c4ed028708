"""`fedsea pseudonyms`: counts and recall for scripts, text at a terminal only."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fedsea.cli import main
from fedsea.cli.pseudonyms import _in_words
from fedsea.evaluation.notes.writer import write_notes


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Frau Anna Schmidt, Tel. 030 901820"}\n{"text": "nothing"}\n', encoding="utf-8")
    return path


def test_preview_counts_types_without_any_text(rows, capsys):
    assert main.run(["pseudonyms", "preview", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 2, "types": {"name": 2, "phone": 1}}


def test_preview_shows_text_at_a_terminal_only_and_touches_no_mapping(rows, capsys, monkeypatch):
    assert main.run(["pseudonyms", "preview", str(rows)]) == 2
    shown = capsys.readouterr()
    assert "only at a terminal" in shown.err
    assert "Schmidt" not in shown.out + shown.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main.run(["pseudonyms", "preview", str(rows)]) == 0
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # what is marked is marked without colours, too
    assert re.search(
        r"Frau \[Anna → \w+ \(name\)\] \[Schmidt → \w+ \(name\)\], Tel\. \[030 901820 → [\d ]+ \(phone\)\]\n", out
    )
    assert sorted(path.name for path in rows.parent.iterdir()) == ["rows.jsonl"]


def test_preview_follows_the_settings_and_refuses_bad_ones(rows, tmp_path, capsys):
    settings = tmp_path / "client.toml"
    settings.write_text('[pseudonyms]\ntypes = ["phone"]\n', encoding="utf-8")
    assert main.run(["pseudonyms", "preview", str(rows), "--settings", str(settings), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == {"phone": 1}
    settings.write_text('[pseudonyms]\nname_files = ["absent"]\n', encoding="utf-8")
    assert main.run(["pseudonyms", "preview", str(rows), "--settings", str(settings), "--json"]) == 2
    assert "cannot be read" in capsys.readouterr().out


def test_recall_is_told_by_type_with_its_interval(capsys):
    assert main.run(["pseudonyms", "recall", "--notes", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == 40
    low, high = found["types"]["all"]["recall_95"]
    assert low < found["types"]["all"]["recall"] < high
    assert main.run(["pseudonyms", "recall", "--notes", "40"]) == 0
    assert re.search(r"missed: \d+ of \d+ names in lower case, both names on a list\n", capsys.readouterr().out)


def test_every_form_of_a_planted_name_has_words():
    forms = {plant.form for note in write_notes(1000, 0) for plant in note.plants if plant.kind == "name"}
    assert len({_in_words(form) for form in forms}) == len(forms)


def test_preview_says_that_there_are_more_rows_only_if_there_are(rows, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for shown, more in (("1", True), ("2", False)):
        assert main.run(["pseudonyms", "preview", str(rows), "--rows", shown]) == 0
        assert ("the first 1 row; --rows shows more" in capsys.readouterr().out) == more
