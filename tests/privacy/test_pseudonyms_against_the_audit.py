"""Shows 6: the server reads everything that leaves, and finds no identifier that was replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedsea.audit.attacks import a1_nearest
from fedsea.data.opening import open_silo
from fedsea.data.tokenizer import load_tokenizer
from fedsea.evaluation.notes.writer import write_notes
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms import Pseudonyms, open_pseudonyms
from tests.support.assets import make_checkpoint
from tests.support.attacked import attacker_of, observed, plan_of, targets_of
from tests.support.mapping import make_mapping

NOTES = [note for note in write_notes(60, seed=3) if len(note.text.encode()) < 240 and len(note.plants) >= 3][:5]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def read_by_the_server(checkpoint: Path, folder: Path, rewrite: Pseudonyms | None) -> list[str]:
    """What A1 makes of the bytes that are sent for the notes as training rows."""
    path = folder / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": note.text}) + "\n" for note in NOTES), encoding="utf-8")
    plan, tokenizer = plan_of(checkpoint, k=1), load_tokenizer(str(checkpoint), vocab_size=None)
    section = plan.data.model_copy(update={"max_tokens": 400, "holdout": 0})
    silo = open_silo([path], tokenizer, section, seed=0, rewrite=rewrite)
    targets = targets_of([torch.from_numpy(sequence.ids).long() for sequence in silo.train()])
    answers = a1_nearest.run(attacker_of(plan), observed(plan, targets))
    return [tokenizer.decode(answer.ids_T.tolist(), skip_special_tokens=True) for answer in answers]


def test_a1_recovers_no_identifier_that_was_replaced_and_every_one_without(checkpoint: Path, tmp_path: Path) -> None:
    make_mapping(tmp_path)
    pseudonyms = open_pseudonyms(PseudonymSettings(enabled=True), tmp_path, "clinic")
    plain = read_by_the_server(checkpoint, tmp_path, None)
    hidden = read_by_the_server(checkpoint, tmp_path, pseudonyms)
    assert len(plain) == len(hidden) == len(NOTES) == 5
    planted = replaced = 0
    for note, open_text, closed_text in zip(NOTES, plain, hidden, strict=True):
        covered = {at for span in pseudonyms.find(note.text) for at in range(span.start, span.end)}
        for plant, text in note.planted():
            planted += 1
            assert text in open_text
            if covered.issuperset(range(plant.start, plant.end)):
                replaced += 1
                assert text not in closed_text
        # It is not the attack that failed: what it reads is the row, with surrogates.
        assert closed_text == pseudonyms([note.text])[0]
        assert pseudonyms.restored(closed_text) == note.text
    assert planted >= 15
    assert replaced >= 0.8 * planted
