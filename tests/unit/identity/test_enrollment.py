"""A client's folder: keys stay where they are, pairs fit, and nothing is installed that should not be."""

from __future__ import annotations

import stat
from dataclasses import replace

import pytest

from fedsea.errors import AuthError, ConfigError, StorageError
from fedsea.wire.identity import Authority, Identity, begin_renewal, enroll, finish_renewal, install, needs_renewal


def test_enrolling_makes_a_private_key_and_a_request_without_it(office):
    enrollment = enroll(office.folder / "clinic", "clinic")
    key = office.folder / "clinic" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE" not in enrollment.csr_pem
    assert enrollment.request_path.read_bytes() == enrollment.csr_pem


def test_enrolling_twice_before_the_answer_keeps_the_key(office):
    first = enroll(office.folder / "clinic", "clinic")
    assert enroll(office.folder / "clinic", "clinic").fingerprint == first.fingerprint


def test_enrolling_over_an_identity_is_refused(office):
    office.add("clinic")
    with pytest.raises(ConfigError, match="already holds an identity"):
        enroll(office.folder / "clinic", "clinic")


def test_enrolling_again_keeps_the_old_identity_until_the_answer_is_installed(office):
    old = office.add("clinic")
    enrollment = enroll(office.folder / "clinic", "clinic", again=True)
    assert Identity.load(office.folder / "clinic", clock=office.clock) == old
    new = office.install("clinic", office.authority.approve(enrollment.csr_pem))
    assert new.fingerprint == enrollment.fingerprint != old.fingerprint
    assert not (office.folder / "clinic" / "key.next.pem").exists()


def test_the_installed_certificate_is_no_answer_to_a_later_request(office):
    first = office.approve("clinic")
    office.install("clinic", first)
    again = enroll(office.folder / "clinic", "clinic", again=True)
    with pytest.raises(AuthError, match=r"installed in .* already: install the one .* of clinic\.request\.pem"):
        office.install("clinic", first)
    assert again.request_path.exists()
    office.install("clinic", office.authority.approve(again.csr_pem))


def test_an_installed_identity_is_what_the_operator_approved(office):
    certificate = office.approve("clinic")
    identity = office.install("clinic", certificate)
    assert (identity.name, identity.serial, identity.not_after) == ("clinic", certificate.serial, certificate.not_after)
    assert identity.ca_fingerprint == office.authority.fingerprint
    assert not list((office.folder / "clinic").glob("*.request.pem"))


def test_the_private_key_is_not_in_the_repr(office):
    assert "PRIVATE" not in repr(office.add("clinic"))


def test_fingerprints_compare_without_regard_to_case_colons_and_spaces(office):
    certificate = office.approve("clinic")
    typed = office.authority.fingerprint.lower().replace(":", " ")
    install(office.folder / "clinic", certificate.pem, office.authority.ca_pem, typed, clock=office.clock)


def test_another_authority_than_the_expected_one_is_not_installed(tmp_path, office):
    certificate = office.approve("clinic")
    other = Authority.create(tmp_path / "other", "other")
    with pytest.raises(AuthError, match="install nothing"):
        install(office.folder / "clinic", certificate.pem, None, other.fingerprint, clock=office.clock)
    assert not (office.folder / "clinic" / "ca.pem").exists()


def test_a_fingerprint_that_is_none_is_refused(office):
    certificate = office.approve("clinic")
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        install(office.folder / "clinic", certificate.pem, None, "AB:12", clock=office.clock)


def test_a_certificate_for_another_key_is_not_installed(office):
    certificate = office.approve("bank")
    enroll(office.folder / "clinic", "clinic")
    with pytest.raises(AuthError, match="does not answer the request"):
        office.install("clinic", certificate)


def test_a_certificate_of_another_authority_is_not_installed(tmp_path, office):
    other = Authority.create(tmp_path / "other", "other", clock=office.clock)
    foreign = other.approve(enroll(office.folder / "clinic", "clinic").csr_pem)
    pem = office.authority.ca_pem
    with pytest.raises(AuthError, match="not issued by the authority"):
        install(office.folder / "clinic", foreign.pem, pem, office.authority.fingerprint, clock=office.clock)


def test_a_clients_certificate_does_not_pass_as_an_authority(office):
    certificate, client = office.approve("clinic"), office.add("bank")
    pretended = install_fingerprint(client.certificate_pem)
    with pytest.raises(AuthError, match="authority's certificate is not one"):
        install(office.folder / "clinic", certificate.pem, client.certificate_pem, pretended, clock=office.clock)


def install_fingerprint(pem: bytes) -> str:
    from fedsea.wire.identity.certificates import certificate_fingerprint, certificate_from_pem

    return certificate_fingerprint(certificate_from_pem(pem, "test"))


def test_a_servers_certificate_is_not_installed_as_a_clients(office):
    server = office.authority.issue_server(["localhost"])
    pem = (server / "certificate.pem").read_bytes()
    with pytest.raises(AuthError, match="not a fedsea client's"):
        install(server, pem, office.authority.ca_pem, office.authority.fingerprint, clock=office.clock)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused_with_how_to_mend_it(office, mode):
    office.add("clinic")
    (office.folder / "clinic" / "key.pem").chmod(mode)
    with pytest.raises(AuthError, match=r"chmod 600 .*key\.pem"):
        Identity.load(office.folder / "clinic", clock=office.clock)


def test_an_expired_identity_says_what_to_do(office):
    office.add("clinic")
    office.clock.move(days=31)
    with pytest.raises(AuthError, match="fedsea enroll --name NAME --again"):
        Identity.load(office.folder / "clinic", clock=office.clock)


def test_a_clock_that_is_behind_is_named(office):
    office.add("clinic")
    office.clock.move(days=-2)
    with pytest.raises(AuthError, match="set the clock"):
        Identity.load(office.folder / "clinic", clock=office.clock)


def test_an_empty_folder_says_to_enroll(tmp_path):
    with pytest.raises(ConfigError, match=r"fedsea enroll.*--identity"):
        Identity.load(tmp_path)


def test_a_folder_that_waits_for_its_answer_says_so(office):
    enroll(office.folder / "clinic", "clinic")
    with pytest.raises(ConfigError, match=r"send .*request\.pem to the operator"):
        Identity.load(office.folder / "clinic")


def test_a_key_of_another_identity_is_refused(office):
    office.add("clinic")
    office.add("bank")
    (office.folder / "clinic" / "key.pem").write_bytes((office.folder / "bank" / "key.pem").read_bytes())
    with pytest.raises(AuthError, match="does not belong to the key"):
        Identity.load(office.folder / "clinic", clock=office.clock)


@pytest.mark.parametrize("file", ["key.pem", "certificate.pem", "ca.pem"])
def test_a_damaged_file_is_named(office, file):
    office.add("clinic")
    path = office.folder / "clinic" / file
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(AuthError, match=file.replace(".", r"\.")):
        Identity.load(office.folder / "clinic", clock=office.clock)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        enroll(tmp_path / "file" / "identity", "clinic")


def test_renewal_is_due_in_the_last_third_of_a_life(office):
    identity = office.add("clinic")
    office.clock.move(days=19)
    assert not needs_renewal(identity, office.clock())
    office.clock.move(days=2)
    assert needs_renewal(identity, office.clock())


def test_a_renewed_identity_has_a_fresh_key_and_the_same_name(office):
    old = office.add("clinic")
    office.clock.move(days=21)
    answer = office.authority.renew(old.certificate_pem, begin_renewal(old))
    new = finish_renewal(old, answer.pem, clock=office.clock)
    assert (new.name, new.serial) == ("clinic", answer.serial)
    assert new.fingerprint != old.fingerprint
    assert Identity.load(office.folder / "clinic", clock=office.clock) == new


def test_the_old_identity_serves_until_the_renewal_is_finished(office):
    old = office.add("clinic")
    begin_renewal(old)
    assert Identity.load(office.folder / "clinic", clock=office.clock) == old


def test_a_renewal_under_another_name_is_not_installed(office):
    old = office.add("clinic")
    other = office.authority.approve(begin_renewal(old), name="bank")
    with pytest.raises(AuthError, match="another name"):
        finish_renewal(old, other.pem, clock=office.clock)
    assert Identity.load(office.folder / "clinic", clock=office.clock) == old


def test_a_renewal_by_another_authority_is_not_installed(tmp_path, office):
    old = office.add("clinic")
    other = Authority.create(tmp_path / "other", "other", clock=office.clock)
    with pytest.raises(AuthError, match="not issued by the authority"):
        finish_renewal(old, other.approve(begin_renewal(old)).pem, clock=office.clock)


def test_a_renewal_for_a_lost_key_is_not_installed(office):
    old = office.add("clinic")
    answer = office.authority.approve(begin_renewal(old))
    (office.folder / "clinic" / "key.next.pem").unlink()
    with pytest.raises(AuthError, match="does not answer the request"):
        finish_renewal(replace(old), answer.pem, clock=office.clock)
