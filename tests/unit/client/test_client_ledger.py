"""Which ledger a run is charged to, when the identity's folder is another one by now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedsea.client.accounts import POINTER, find_ledgers, open_boundary, reports
from fedsea.errors import StorageError
from fedsea.privacy.book import ANCHOR, FILE, Book
from fedsea.types import Origin, Purpose
from tests.unit.privacy.plans import noised

PLAN = noised()


def release(identity: Path, run: Path, *, own_run: bool = True, name: str = "a", run_id: str = "r") -> None:
    with open_boundary(PLAN, name, run_id, identity=identity, run=run, settings=None, own_run=own_run) as boundary:
        boundary.hidden(torch.ones(2, 4), Origin(Purpose.TRAINING, (2,)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    release(tmp_path / "old", folder)
    return folder


@pytest.mark.parametrize("own_run", [True, False])
def test_a_run_goes_on_with_the_ledger_that_it_was_charged_to_or_not_at_all(tmp_path, run, own_run):
    new = tmp_path / "new"
    with pytest.raises(StorageError, match="missing or another: nothing was sent"):
        release(new, run, own_run=own_run)
    assert not find_ledgers(new)
    (old,) = find_ledgers(tmp_path / "old")
    shutil.copytree(old, new / "ledger" / old.name)
    release(new, run, own_run=own_run)
    assert Book.open(find_ledgers(new)[0]).spent.total == pytest.approx(2 * Book.open(old).spent.total)


def test_a_ledger_that_was_removed_does_not_begin_again(tmp_path, run):
    (old,) = find_ledgers(tmp_path / "old")
    for name in (FILE, ANCHOR):
        (old / name).unlink()
    with pytest.raises(StorageError, match="charged to the privacy ledger in"):
        release(tmp_path / "old", run)


def test_another_ledger_of_the_same_client_and_plan_does_not_stand_in(tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    release(tmp_path / "new", other)
    with pytest.raises(StorageError, match="another ledger, or an old copy"):
        release(tmp_path / "new", run)
    assert Book.open(find_ledgers(tmp_path / "new")[0]).spent.total == Book.open(find_ledgers(run)[0]).spent.total


def test_a_run_of_another_client_says_nothing_and_one_that_cannot_be_read_stops(tmp_path, run):
    release(tmp_path / "new", run, name="b", own_run=False)
    (run / POINTER).write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        release(tmp_path / "old", run)


def test_an_old_copy_of_the_whole_ledger_is_refused_by_a_run_that_was_charged_since(tmp_path, run):
    identity = tmp_path / "old"
    shutil.copytree(identity, tmp_path / "backup")
    release(identity, run, own_run=False)
    shutil.rmtree(identity)
    shutil.copytree(tmp_path / "backup", identity)
    for again in (lambda: release(identity, run), lambda: reports(run)):
        with pytest.raises(StorageError, match="an old copy was put back"):
            again()


def test_a_ledger_that_went_on_without_a_run_is_no_old_copy(tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    release(tmp_path / "old", other, run_id="s")
    release(tmp_path / "old", run)
    assert len(reports(run)) == 1
