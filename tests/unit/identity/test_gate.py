"""The gate admits approved clients, and notices within a second what the operator does."""

from __future__ import annotations

import shutil

import pytest

from fedsea.errors import AuthError, ConfigError, StorageError, TransportError
from fedsea.wire.identity import Authority, Identity, PeerGate, begin_renewal, enroll
from fedsea.wire.identity.peers import LOOK_EVERY_S


def gate_of(office, allowed=None) -> PeerGate:
    return PeerGate(office.folder / "ca", allowed, clock=office.clock, monotonic=office.clock.monotonic)


def look_again(office) -> None:
    office.clock.move(seconds=LOOK_EVERY_S)


def test_an_approved_client_is_admitted_under_its_name(office):
    identity = office.add("clinic")
    peer = gate_of(office).check(identity.certificate_pem)
    assert (peer.name, peer.serial, peer.not_after) == ("clinic", identity.serial, identity.not_after)


def test_a_client_approved_while_the_server_runs_is_admitted(office):
    gate = gate_of(office)
    identity = office.add("clinic")
    look_again(office)
    assert gate.check(identity.certificate_pem).name == "clinic"


def test_a_revocation_takes_effect_within_a_second(office):
    identity = office.add("clinic")
    gate = gate_of(office)
    gate.check(identity.certificate_pem)
    office.authority.revoke("clinic", "left")
    look_again(office)
    with pytest.raises(AuthError, match="was revoked"):
        gate.check(identity.certificate_pem)


def test_a_client_that_never_comes_is_known_to_be_barred(office):
    office.add("clinic")
    lost = office.add("bank")
    gate = gate_of(office)
    assert [gate.barred(name) for name in ("clinic", "bank", "nobody")] == ["", "", ""]
    office.authority.revoke("clinic", "left")
    office.authority.revoke(lost.serial)
    look_again(office)
    assert [gate.barred(name) for name in ("clinic", "bank")] == ["revoked", "revoked"]
    office.authority.approve(enroll(office.folder / "clinic", "clinic", again=True).csr_pem, again=True)
    look_again(office)
    assert gate.barred("clinic") == ""
    office.clock.move(days=31)
    assert gate.barred("clinic") == "expired"
    (office.folder / "ca" / "journal.jsonl").write_text("no journal\n")
    look_again(office)
    assert gate.barred("clinic") == ""


def test_revoking_one_serial_leaves_the_clients_other_certificate(office):
    first = office.add("clinic")
    second = office.install("clinic", office.authority.approve(enroll(first.folder, "clinic", again=True).csr_pem))
    office.authority.revoke(first.serial)
    gate = gate_of(office)
    with pytest.raises(AuthError, match="was revoked"):
        gate.check(first.certificate_pem)
    assert gate.check(second.certificate_pem).name == "clinic"


def test_a_reapproved_client_enters_with_its_new_certificate_only(office):
    old = office.add("clinic")
    office.authority.revoke("clinic")
    request = enroll(old.folder, "clinic", again=True).csr_pem
    new = office.install("clinic", office.authority.approve(request, again=True))
    gate = gate_of(office)
    assert gate.check(new.certificate_pem).serial == new.serial
    with pytest.raises(AuthError, match="was revoked"):
        gate.check(old.certificate_pem)


def test_a_certificate_that_expires_during_the_connection_is_refused(office):
    identity = office.add("clinic")
    gate = gate_of(office)
    gate.check(identity.certificate_pem)
    office.clock.move(days=30, seconds=1)
    with pytest.raises(AuthError, match="expired"):
        gate.check(identity.certificate_pem)


def test_a_connection_whose_certificate_was_renewed_is_told_to_reconnect(office):
    identity = office.add("clinic")
    gate = gate_of(office)
    office.clock.move(days=25)
    office.authority.renew(identity.certificate_pem, begin_renewal(identity))
    office.clock.move(days=6)
    with pytest.raises(TransportError, match="reconnect"):
        gate.check(identity.certificate_pem)


def test_another_authoritys_client_is_refused(tmp_path, office):
    other = Authority.create(tmp_path / "other", "other", clock=office.clock)
    foreign = other.approve(enroll(tmp_path / "x", "clinic").csr_pem)
    with pytest.raises(AuthError, match="another authority"):
        gate_of(office).check(foreign.pem)


def test_a_servers_certificate_does_not_enter_as_a_client(office):
    server = Identity.load(office.authority.issue_server(["localhost"]), clock=office.clock)
    with pytest.raises(AuthError, match="not a fedsea client's"):
        gate_of(office).check(server.certificate_pem)


def test_the_authoritys_own_certificate_does_not_enter(office):
    with pytest.raises(AuthError, match="not a fedsea client's"):
        gate_of(office).check(office.authority.ca_pem)


@pytest.mark.parametrize("pem", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(office, pem):
    with pytest.raises(AuthError, match="not a certificate"):
        gate_of(office).check(pem)


def test_a_certificate_that_the_journal_does_not_know_is_refused(office):
    (office.folder / "before.jsonl").write_bytes((office.folder / "ca" / "journal.jsonl").read_bytes())
    identity = office.add("clinic")
    shutil.copy(office.folder / "before.jsonl", office.folder / "ca" / "journal.jsonl")
    with pytest.raises(AuthError, match="journal does not know"):
        gate_of(office).check(identity.certificate_pem)


def test_a_client_outside_the_plan_is_refused(office):
    clinic, bank = office.add("clinic"), office.add("bank")
    gate = gate_of(office, allowed=["clinic"])
    assert gate.check(clinic.certificate_pem).name == "clinic"
    with pytest.raises(AuthError, match="not on the server's list"):
        gate.check(bank.certificate_pem)


def test_a_changed_allow_list_file_takes_effect(office):
    identity = office.add("clinic")
    names = office.folder / "names.txt"
    names.write_text("# who may come\nbank\n")
    gate = gate_of(office, allowed=names)
    with pytest.raises(AuthError, match="not on the server's list"):
        gate.check(identity.certificate_pem)
    names.write_text("bank\nclinic  # since May\n")
    look_again(office)
    assert gate.check(identity.certificate_pem).name == "clinic"


def test_nobody_enters_while_the_journal_cannot_be_read_and_everybody_afterwards(office):
    identity = office.add("clinic")
    gate = gate_of(office)
    journal = office.folder / "ca" / "journal.jsonl"
    journal.rename(journal.with_suffix(".away"))
    look_again(office)
    with pytest.raises(AuthError, match="admits nobody"):
        gate.check(identity.certificate_pem)
    journal.with_suffix(".away").rename(journal)
    look_again(office)
    assert gate.check(identity.certificate_pem).name == "clinic"


def test_files_are_looked_at_once_a_second_at_most(office, monkeypatch):
    identity = office.add("clinic")
    gate = gate_of(office)
    looks = []
    monkeypatch.setattr(gate._record, "look", lambda: looks.append(1))
    for _ in range(100):
        gate.check(identity.certificate_pem)
    look_again(office)
    for _ in range(100):
        gate.check(identity.certificate_pem)
    assert len(looks) == 1


def test_a_gate_without_an_authority_says_what_to_make(tmp_path):
    with pytest.raises(ConfigError, match="fedsea ca init"):
        PeerGate(tmp_path)


def test_a_gate_without_a_journal_does_not_open(office):
    (office.folder / "ca" / "journal.jsonl").unlink()
    with pytest.raises(StorageError):
        gate_of(office)
