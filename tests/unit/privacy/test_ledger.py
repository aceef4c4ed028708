"""The ledger: what it counts, what it refuses, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsea.errors import BudgetExhausted, StorageError
from fedsea.privacy.accountant import epsilon_of
from fedsea.privacy.book import ANCHOR, FILE, VERSION, Book
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.pricing import Charge
from fedsea.types import Channel, Origin, Purpose
from tests.unit.privacy.plans import CLAIMED, noised

PLAN = noised()


def charge(amount: float = 0.25, *units: str, every: float = 0.0) -> Charge:
    pairs = tuple((unit, amount) for unit in units)
    return Charge(Channel.HIDDEN, Purpose.TRAINING, max(1, len(units)), pairs, every)


def filled(folder: Path, count: int = 3) -> Path:
    with Ledger(folder, PLAN, "a", "run") as ledger:
        for number in range(count):
            ledger.charge(charge(0.25, "same", f"own {number}"))
    return folder


def test_units_add_up_apart_and_the_largest_counts(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        for number in range(4):
            ledger.charge(charge(0.25, "same", f"own {number}"))
        ledger.charge(charge(every=0.5))
        assert ledger.spent.total == pytest.approx(4 * 0.25 + 0.5)
        assert ledger.spent.num_units == 5
    book = Book.open(tmp_path)
    assert book.spent.total == pytest.approx(1.5)
    assert book.spent.account(Channel.HIDDEN, Purpose.TRAINING).releases == 9


def test_a_unit_may_come_several_times_in_one_charge(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        ledger.charge(charge(0.25, "d", "d", "e"))
        assert ledger.spent.total == pytest.approx(0.5)


def test_channels_and_purposes_have_accounts_of_their_own(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        ledger.charge(Charge(Channel.HIDDEN, Purpose.TRAINING, 1, (("x", 1.0),)))
        ledger.charge(Charge(Channel.GRADIENT, Purpose.TRAINING, 1, (("x", 2.0),)))
        ledger.charge(Charge(Channel.HIDDEN, Purpose.EVALUATION, 1, (("y", 4.0),)))
        ledger.charge(Charge(Channel.HIDDEN, Purpose.INFERENCE, 1, every=0.5))
        assert ledger.spent.total == pytest.approx(4.5)
        assert ledger.spent.account(Channel.GRADIENT, Purpose.TRAINING).most == 2.0
        assert ledger.spent.account(Channel.HIDDEN, Purpose.EVALUATION).most == 4.0
        assert ledger.spent.account(Channel.UPDATE, Purpose.TRAINING).releases == 0


def test_spending_goes_on_over_commands_and_runs(tmp_path):
    for run in ("one", "two", "two"):
        with Ledger(tmp_path, PLAN, "a", run) as ledger:
            ledger.charge(charge(0.25, "same"))
    book = Book.open(tmp_path)
    assert book.spent.total == pytest.approx(0.75)
    assert [run for run, _ in book.runs] == ["one", "two"]


def test_no_unit_can_be_read_from_the_file_and_only_its_owner_may_read_it(tmp_path):
    filled(tmp_path)
    raw = (tmp_path / FILE).read_text()
    assert "same" not in raw
    assert "own" not in raw
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    other = filled(tmp_path / "other")
    keys = [json.loads(line).get("new") for line in raw.splitlines()]
    theirs = [json.loads(line).get("new") for line in (other / FILE).read_text().splitlines()]
    assert keys != theirs  # salted: the same documents look otherwise in another ledger


def test_a_budget_is_not_passed_and_what_fits_still_goes(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        ledger.charge(charge(0.6, "x"), limit=1.0)
        with pytest.raises(BudgetExhausted, match="nothing was sent"):
            ledger.charge(charge(0.6, "x"), limit=1.0)
        ledger.charge(charge(0.6, "y"), limit=1.0)
        with pytest.raises(BudgetExhausted):
            ledger.charge(charge(every=0.6), limit=1.0)
        ledger.charge(charge(every=0.4), limit=1.0)
        assert ledger.spent.total == pytest.approx(1.0)


def test_the_budget_of_a_plan_is_reached_and_never_passed(tmp_path):
    plan = noised({**CLAIMED, "epsilon": 3.0})
    with Ledger(tmp_path, plan, "a") as ledger:
        boundary = Boundary.of(plan, "a", ledger)
        origin = Origin(Purpose.TRAINING, (3,), ("d",), (0,))
        with pytest.raises(BudgetExhausted):
            _forever(lambda: boundary.hidden(torch.randn(3, 8), origin))
        spent = epsilon_of(ledger.spent.total**0.5, 1e-5)
        assert 2.0 < spent <= 3.0
        assert epsilon_of((ledger.spent.total + 0.25) ** 0.5, 1e-5) > 3.0


def _forever(release: Callable[[], object]) -> None:
    for _ in range(1000):
        release()


def test_two_processes_charge_one_ledger(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as one, Ledger(tmp_path, PLAN, "a") as other:
        one.charge(charge(0.25, "x"), limit=0.6)
        other.charge(charge(0.25, "x", "y"), limit=0.6)
        with pytest.raises(BudgetExhausted):
            one.charge(charge(0.25, "x"), limit=0.6)
        assert one.spent.total == pytest.approx(0.5)
    assert Book.open(tmp_path).spent.num_units == 2


def test_threads_charge_one_ledger(tmp_path):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        threads = [threading.Thread(target=lambda: [ledger.charge(charge(0.25, "x")) for _ in range(10)]) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.spent.total == pytest.approx(5.0)
    assert Book.open(tmp_path).spent.total == pytest.approx(5.0)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path, reason: str) -> None:
    for opened in (lambda: Ledger(folder, PLAN, "a"), lambda: Book.open(folder)):
        with pytest.raises(StorageError, match=reason):
            opened()


def test_a_closed_ledger_and_one_of_before_a_fork_charge_nothing(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, PLAN, "a")
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StorageError, match="forked"):
            ledger.charge(charge(0.25, "same"))
    ledger.charge(charge(0.25, "same"))
    ledger.close()
    ledger.close()
    with pytest.raises(StorageError, match="closed"):
        ledger.charge(charge(0.25, "same"))
    assert Book.open(tmp_path).spent.total == pytest.approx(0.25)


def test_a_ledger_that_is_exchanged_while_it_is_written_to_lets_nothing_be_sent(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, PLAN, "a")
    write = os.write

    def exchanged(descriptor: int, line: bytes) -> int:
        (tmp_path / FILE).unlink()
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", exchanged)
    with pytest.raises(StorageError, match="removed or replaced"):
        ledger.charge(charge(0.25, "same"))


def lines_of(folder: Path) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


def test_a_changed_amount_is_refused(tmp_path):
    filled(tmp_path)
    raw = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw.replace(b"[0,0.25]", b"[0,0.05]", 1))
    refused(tmp_path, "line 3 is not what was written")


def test_a_missing_line_is_refused(tmp_path):
    lines = lines_of(filled(tmp_path))
    (tmp_path / FILE).write_bytes(b"".join(lines[:2] + lines[3:]))
    refused(tmp_path, "is not what was written")


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_truncated_ledger_is_refused(tmp_path, kept):
    lines = lines_of(filled(tmp_path))
    (tmp_path / FILE).write_bytes(b"".join(lines[:kept]))
    refused(tmp_path, "truncated or replaced")


def test_a_process_that_is_killed_leaves_no_ledger_that_can_lose_its_first_charge_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsea.privacy.ledger._ANCHOR_EVERY_S", 3600.0)
    ledgers = [Ledger(tmp_path, PLAN, "a") for _ in range(2)]
    for ledger in ledgers:
        ledger.charge(charge())
        killed = tmp_path / f"killed {len(lines_of(tmp_path))}"
        killed.mkdir()
        shutil.copy(tmp_path / ANCHOR, killed)
        (killed / FILE).write_bytes(b"".join(lines_of(tmp_path)[:-1]))
        refused(killed, "truncated or replaced")
    for ledger in ledgers:
        ledger.close()


def test_a_last_line_that_is_cut_in_half_after_it_was_anchored_is_refused(tmp_path):
    raw = (filled(tmp_path) / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw[:-20])
    refused(tmp_path, "truncated or replaced")


def test_an_old_copy_is_refused(tmp_path):
    filled(tmp_path / "now", 1)
    shutil.copy(tmp_path / "now" / FILE, tmp_path / "copy")
    filled(tmp_path / "now", 2)
    shutil.copy(tmp_path / "copy", tmp_path / "now" / FILE)
    refused(tmp_path / "now", "truncated or replaced")


def test_a_new_ledger_in_place_of_one_that_was_removed_is_refused(tmp_path):
    (filled(tmp_path) / FILE).unlink()
    with pytest.raises(StorageError, match="truncated or replaced"):
        Ledger(tmp_path, PLAN, "a")


@pytest.mark.parametrize(("anchor", "reason"), [(None, "is missing"), (b"", "cannot be read"), (b"{}", "cannot be")])
def test_a_missing_or_damaged_anchor_is_refused(tmp_path, anchor, reason):
    path = filled(tmp_path) / ANCHOR
    path.unlink() if anchor is None else path.write_bytes(anchor)
    refused(tmp_path, reason)


def test_another_plans_ledger_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(StorageError, match="another plan"):
        Ledger(tmp_path, noised({**CLAIMED, "hidden_std": 5.0}), "a")


@pytest.mark.parametrize("version", [VERSION + 1, None])
def test_a_ledger_of_another_version_is_refused(tmp_path, version):
    about = {"version": version, "plan_sha256": PLAN.sha256(), "client": "a", "plan": PLAN.to_json(), "salt": "00"}
    (tmp_path / FILE).write_bytes(Book(tmp_path).line_of({"about": about}))
    refused(tmp_path, "another version of fedsea")


def test_another_clients_ledger_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(StorageError, match="another client"):
        Ledger(tmp_path, PLAN, "b")


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"some": "json"}\n')
    refused(tmp_path, "not what was written")


def exchange(path: Path) -> None:
    """Another file of the same bytes takes its place."""
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


def put_back(path: Path) -> None:
    """An old copy is written into the very file, and the anchor with it; another process charges that on."""
    shutil.copy(path.parent / "old" / ANCHOR, path.parent / ANCHOR)
    path.write_bytes((path.parent / "old" / FILE).read_bytes())
    with Ledger(path.parent, PLAN, "a") as other:
        other.charge(charge(0.25, "z"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (lambda path: path.unlink(), "removed or replaced"),
    "its folder moved": (lambda path: path.parent.rename(path.parent.with_name("moved")), "removed or replaced"),
    "replaced": (exchange, "removed or replaced"),
    "truncated": (lambda path: os.truncate(path, 100), "shorter"),
    "old lines, and as many": (put_back, "its lines are others"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_released_when_the_ledger_was_exchanged_or_cut_while_it_is_in_use(tmp_path, damage):
    change, reason = DAMAGES[damage]
    folder = tmp_path / "ledger"
    with Ledger(folder, PLAN, "a") as ledger:
        boundary = Boundary.of(PLAN, "a", ledger)
        shutil.copytree(folder, folder / "old")
        boundary.hidden(torch.randn(3, 8), Origin(Purpose.TRAINING, (3,), ("d",), (0,)))
        change(folder / FILE)
        for _ in range(2):
            with pytest.raises(StorageError, match=reason):
                boundary.hidden(torch.randn(3, 8), Origin(Purpose.TRAINING, (3,), ("d",), (0,)))
        assert ledger.spent.total == pytest.approx(0.25)
        with pytest.raises(StorageError, match=reason):
            ledger.close()


# --- a disk that refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "half a write", "fsync"])
def test_nothing_is_released_when_the_disk_refuses_the_charge(tmp_path, monkeypatch, call):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        boundary = Boundary.of(PLAN, "a", ledger)
        origin = Origin(Purpose.TRAINING, (3,), ("d",), (0,))
        real_write = os.write

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def half(descriptor, data):
            return real_write(descriptor, data[: len(data) // 2])

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync" if call == "fsync" else "write", half if call == "half a write" else full)
            with pytest.raises(StorageError, match="disk is full"):
                boundary.hidden(torch.randn(3, 8), origin)
        assert ledger.spent.total == 0.0
        boundary.hidden(torch.randn(3, 8), origin)
        assert ledger.spent.total == pytest.approx(0.25)
    assert Book.open(tmp_path).spent.total == pytest.approx(0.25)


def test_a_torn_line_that_cannot_be_cut_off_at_once_is_cut_off_later(tmp_path, monkeypatch):
    with Ledger(tmp_path, PLAN, "a") as ledger:
        real_write = os.write

        def refuse(*_):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))
            patched.setattr(os, "ftruncate", refuse)
            with pytest.raises(StorageError):
                ledger.charge(charge(0.25, "x"))
        ledger.charge(charge(0.25, "x"))
        assert ledger.spent.total == pytest.approx(0.25)
    assert Book.open(tmp_path).spent.total == pytest.approx(0.25)


def test_the_names_of_a_new_ledgers_folders_are_durable_before_anything_is_charged(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = tmp_path / "identity" / "ledger" / "plan"
    with Ledger(folder, noised(), "a"):
        assert {path.stat().st_ino for path in (folder, folder.parent, folder.parent.parent)} <= synced
