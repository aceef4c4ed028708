"""A kill between any two writes, or in the middle of one, leaves a state that the next attempt goes on from.

Each case forks a child that dies at its n-th system call which changes the disk, for n = 1, 2, … until the child gets
through; then the parent looks at what is left, and does the same thing again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsea.wire.identity import Authority, Identity, PeerGate, begin_renewal, enroll, finish_renewal

KILLED, GOT_THROUGH, RAISED = 9, 0, 3
MOST_CALLS = 60


def deaths(work: Callable[[], object]) -> Iterator[None]:
    """Yield after every death of a child that does `work`; ends when the child got through."""
    for n in range(1, MOST_CALLS):
        child = os.fork()
        if child == 0:
            status = RAISED
            with contextlib.suppress(BaseException):
                die_at(n)
                work()
                status = GOT_THROUGH
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (KILLED, GOT_THROUGH)
        if status == GOT_THROUGH:
            assert n > 3, "the child met hardly any write: the injection does not reach them"
            return
        yield
    raise AssertionError(f"the child never got through in {MOST_CALLS} calls")


def die_at(n: int) -> None:
    """Replace the calls that change the disk; at the n-th one, half of it is done and the process is gone."""
    calls = iter(range(1, n + 1))

    def dying(function: Callable[..., object], half: Callable[..., object] | None = None) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            if next(calls) == n:
                if half is not None:
                    half(*args)
                os._exit(KILLED)
            return function(*args, **options)

        return call

    write = os.write
    os.write = dying(write, half=lambda fd, data: write(fd, data[: len(data) // 2]))
    for name in ("fsync", "replace", "ftruncate"):
        setattr(os, name, dying(getattr(os, name)))
    for name in ("replace", "unlink", "write_bytes", "chmod"):
        setattr(Path, name, dying(getattr(Path, name)))


def test_a_killed_init_is_done_again(tmp_path):
    for _ in deaths(lambda: Authority.create(tmp_path / "ca", "test")):
        if (tmp_path / "ca" / "ca.pem").exists():
            assert Authority.open(tmp_path / "ca").entries() == []
            (tmp_path / "ca" / "ca.pem").unlink()  # so that the next child has something to do
    assert Authority.open(tmp_path / "ca").entries() == []


def test_a_killed_approval_leaves_whole_lines_and_no_certificate_out_of_the_journal(office):
    csr = enroll(office.folder / "clinic", "clinic").csr_pem
    office.approve("bank")
    for _ in deaths(lambda: office.authority.approve(csr)):
        names = {entry.name for entry in office.authority.entries()}
        assert "bank" in names
        assert names <= {"bank", "clinic"}
    issued = office.authority.approve(csr)
    assert issued.serial in {entry.serial for entry in office.authority.entries()}


def test_a_revocation_counts_once_the_command_got_through(office):
    identity = office.add("clinic")
    for _ in deaths(lambda: office.authority.revoke("clinic")):
        assert len(office.authority.entries()) == 1
    gate = PeerGate(office.folder / "ca", clock=office.clock)
    with pytest.raises(Exception, match="was revoked"):
        gate.check(identity.certificate_pem)


def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(office):
    office.approve("bank")
    journal = office.folder / "ca" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:100])
    assert [entry.name for entry in office.authority.entries()] == ["bank"]
    office.approve("clinic")
    assert [entry.name for entry in office.authority.entries()] == ["bank", "clinic"]


def test_a_killed_enrolment_is_done_again_with_one_key(office):
    for _ in deaths(lambda: enroll(office.folder / "clinic", "clinic")):
        pass
    identity = office.add("clinic")
    assert identity.name == "clinic"


def test_a_killed_installation_is_done_again(office):
    certificate = office.approve("clinic")
    for _ in deaths(lambda: office.install("clinic", certificate)):
        pass
    assert Identity.load(office.folder / "clinic", clock=office.clock).serial == certificate.serial


def test_a_killed_renewal_leaves_the_old_identity_or_the_new_one(office):
    old = office.add("clinic")
    office.clock.move(days=21)
    answer = office.authority.renew(old.certificate_pem, begin_renewal(old))
    seen = set()
    for _ in deaths(lambda: finish_renewal(old, answer.pem, clock=office.clock)):
        seen.add(Identity.load(office.folder / "clinic", clock=office.clock).serial)
    assert seen == {old.serial, answer.serial}


def test_a_killed_server_renewal_leaves_the_old_identity_or_a_new_one(office):
    folder = office.authority.issue_server(["localhost"])
    for _ in deaths(office.authority.issue_server):
        assert Identity.load(folder, clock=office.clock).name == "localhost"
