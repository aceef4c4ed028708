"""The authority issues what it should, to whom it should, and remembers it."""

from __future__ import annotations

import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedsea.errors import AuthError, ConfigError, StorageError
from fedsea.wire.identity import Authority, Identity, begin_renewal, enroll
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.renewal import MOST_RENEWALS
from fedsea.wire.identity.requests import make_request


def leaf(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_a_client_certificate_names_the_client_twice_and_serves_clients_only(office):
    certificate = leaf(office.approve("clinic").pem)
    assert certs.client_name(certificate) == "clinic"
    assert certs.role_of(certificate) is certs.Role.CLIENT
    uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert uris.get_values_for_type(x509.UniformResourceIdentifier) == ["fedsea:client:clinic"]


def test_certificates_begin_five_minutes_early_for_slow_clocks(office):
    certificate = leaf(office.approve("clinic").pem)
    assert certificate.not_valid_before_utc == office.clock.now - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == office.clock.now + timedelta(days=30)


def test_a_certificate_never_outlives_its_authority(tmp_path, office):
    short = Authority.create(tmp_path / "short", "short", days=3, clock=office.clock)
    issued = short.approve(enroll(tmp_path / "a", "a").csr_pem, days=30)
    assert issued.not_after == office.clock.now + timedelta(days=3)


def test_an_expired_authority_issues_nothing(tmp_path, office):
    short = Authority.create(tmp_path / "short", "short", days=3, clock=office.clock)
    office.clock.move(days=4)
    with pytest.raises(AuthError, match="authority itself has expired"):
        short.approve(enroll(tmp_path / "a", "a").csr_pem)


def test_the_server_identity_carries_names_and_addresses_and_serves_servers_only(office):
    folder = office.authority.issue_server(["fedsea.example.org", "127.0.0.1", "::1"])
    identity = Identity.load(folder, clock=office.clock)
    certificate = leaf(identity.certificate_pem)
    assert certs.host_names(certificate) == ("fedsea.example.org", "127.0.0.1", "::1")
    assert certs.role_of(certificate) is certs.Role.SERVER
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600


def test_renewing_the_server_keeps_its_host_names_and_changes_its_key(office):
    before = Identity.load(office.authority.issue_server(["a.example.org", "b.example.org"]), clock=office.clock)
    after = Identity.load(office.authority.issue_server(), clock=office.clock)
    assert certs.host_names(leaf(after.certificate_pem)) == ("a.example.org", "b.example.org")
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("host", ["", "a b", "example.org:443", "https://example.org", "-" * 300])
def test_a_server_is_not_issued_for_what_is_no_host(office, host):
    with pytest.raises(ConfigError, match="neither a host name"):
        office.authority.issue_server([host] if host else ["ok.example", ""])


def test_open_finds_the_same_authority(office):
    reopened = Authority.open(office.folder / "ca", clock=office.clock)
    office.approve("clinic")
    assert reopened.fingerprint == office.authority.fingerprint
    assert [entry.name for entry in reopened.entries()] == ["clinic"]


def test_a_second_authority_is_not_made_over_the_first(office):
    with pytest.raises(ConfigError, match="already holds an authority"):
        Authority.create(office.folder / "ca", "another")


def test_the_authority_key_is_readable_by_its_owner_alone_and_refused_otherwise(office):
    key = office.folder / "ca" / "ca.key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o640)
    with pytest.raises(AuthError, match="chmod 600"):
        Authority.open(office.folder / "ca")


def test_an_authority_with_another_ones_key_is_not_opened(tmp_path, office):
    other = Authority.create(tmp_path / "other", "other")
    (office.folder / "ca" / "ca.pem").write_bytes(other.ca_pem)
    with pytest.raises(AuthError, match="does not belong"):
        Authority.open(office.folder / "ca")


def test_approving_shows_the_same_fingerprint_as_enrolling(office):
    enrollment = enroll(office.folder / "clinic", "clinic")
    request, valid = office.authority.inspect(enrollment.csr_pem)
    assert request.fingerprint == enrollment.fingerprint
    assert valid == []


def test_inspecting_tells_of_valid_certificates_under_the_same_name(office):
    office.add("clinic")
    _, valid = office.authority.inspect(make_request(certs.new_key(), "clinic"))
    assert [entry.name for entry in valid] == ["clinic"]


def signed_request(key, name="clinic") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"]
)
def test_a_request_with_another_type_of_key_is_refused(office, key):
    with pytest.raises(AuthError, match="P-256"):
        office.authority.approve(signed_request(key))


def test_a_request_that_was_changed_is_refused(office):
    pem = make_request(certs.new_key(), "clinic")
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER))
    at = bytes(der).index(b"clinic")
    der[at : at + 6] = b"cronic"
    changed = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(AuthError, match="not signed by its own key"):
        office.authority.approve(changed)


@pytest.mark.parametrize("pem", [b"", b"hello", b"x" * 100_000, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_what_is_no_request_is_refused(office, pem):
    with pytest.raises(AuthError, match="not a signing request"):
        office.authority.approve(pem)


@pytest.mark.parametrize("name", ["Clinic", "../etc", "a b", "-a", "x" * 64])
def test_a_name_outside_the_pattern_is_refused(office, name):
    with pytest.raises(ConfigError, match="cannot be a client's name"):
        office.authority.approve(signed_request(certs.new_key(), name))


def test_the_operator_may_give_another_name(office):
    assert office.approve("clinic", name="clinic-north").name == "clinic-north"


def test_an_unusable_request_leaves_the_journal_as_it_was(office):
    with pytest.raises(ConfigError):
        office.approve("clinic", name="No Name")
    assert office.authority.entries() == []


def test_entries_say_how_each_certificate_stands(office):
    office.approve("bank", days=1)
    office.approve("clinic")
    office.approve("office")
    office.authority.revoke("clinic", "left")
    office.clock.move(days=2)
    found = {entry.name: entry.status(office.clock.now) for entry in office.authority.entries()}
    assert found == {"bank": "expired", "clinic": "revoked", "office": "valid"}


def test_revoking_a_name_revokes_all_its_certificates(office):
    serials = {office.approve("clinic").serial for _ in range(3)}
    kept = office.approve("bank").serial
    assert {entry.serial for entry in office.authority.revoke("clinic")} == serials
    assert [e.serial for e in office.authority.entries() if e.revoked is None] == [kept]


def test_revoking_a_serial_revokes_that_certificate_and_what_was_renewed_from_it(office):
    first, other = office.add("clinic"), office.approve("other", name="clinic").serial
    office.clock.move(days=25)
    renewed = office.authority.renew(first.certificate_pem, begin_renewal(first)).serial
    assert {entry.serial for entry in office.authority.revoke(first.serial)} == {first.serial, renewed}
    assert [e.serial for e in office.authority.entries() if e.revoked is None] == [other]


def test_a_revoked_name_is_approved_only_on_request_and_old_certificates_stay_revoked(office):
    old = office.approve("clinic").serial
    office.authority.revoke("clinic")
    with pytest.raises(AuthError, match="--again"):
        office.approve("clinic")
    new = office.approve("clinic", again=True).serial
    assert {e.serial: e.revoked is None for e in office.authority.entries()} == {old: False, new: True}


def test_revoking_an_unknown_name_says_so(office):
    with pytest.raises(ConfigError, match="fedsea ca list"):
        office.authority.revoke("nobody")


def test_revoking_the_server_says_what_to_do_instead(office):
    office.authority.issue_server(["localhost"])
    with pytest.raises(ConfigError, match="fedsea ca server"):
        office.authority.revoke(office.authority.entries()[0].serial)


def test_renewal_gives_the_same_name_a_new_certificate(office):
    identity = office.add("clinic")
    office.clock.move(days=21)
    renewed = office.authority.renew(identity.certificate_pem, begin_renewal(identity))
    assert (renewed.name, renewed.not_after) == ("clinic", office.clock.now + timedelta(days=30))


def test_the_same_renewal_twice_gives_the_same_certificate(office):
    identity = office.add("clinic")
    office.clock.move(days=21)
    first = office.authority.renew(identity.certificate_pem, begin_renewal(identity))
    assert office.authority.renew(identity.certificate_pem, begin_renewal(identity)) == first


def test_renewal_is_refused_in_the_first_half_of_a_life(office):
    identity = office.add("clinic")
    office.clock.move(days=10)
    with pytest.raises(AuthError, match="not renewed now"):
        office.authority.renew(identity.certificate_pem, begin_renewal(identity))


def test_one_certificate_cannot_be_renewed_without_end(office):
    identity = office.add("clinic")
    office.clock.move(days=21)
    for _ in range(MOST_RENEWALS):
        office.authority.renew(identity.certificate_pem, make_request(certs.new_key(), "clinic"))
    with pytest.raises(AuthError, match="not renewed now"):
        office.authority.renew(identity.certificate_pem, make_request(certs.new_key(), "clinic"))


def test_renewal_for_another_name_is_refused(office):
    identity = office.add("clinic")
    office.clock.move(days=21)
    with pytest.raises(AuthError, match="another name"):
        office.authority.renew(identity.certificate_pem, make_request(certs.new_key(), "bank"))


def test_a_revoked_client_is_not_renewed(office):
    identity = office.add("clinic")
    office.clock.move(days=21)
    office.authority.revoke("clinic")
    with pytest.raises(AuthError, match="revoked"):
        office.authority.renew(identity.certificate_pem, begin_renewal(identity))


def test_an_expired_client_is_not_renewed(office):
    identity = office.add("clinic")
    office.clock.move(days=31)
    with pytest.raises(AuthError, match="expired"):
        office.authority.renew(identity.certificate_pem, begin_renewal(identity))


def test_another_authoritys_client_is_not_renewed(tmp_path, office):
    identity = office.add("clinic")
    other = Authority.create(tmp_path / "other", "other", clock=office.clock)
    with pytest.raises(AuthError, match="not issued by"):
        other.renew(identity.certificate_pem, begin_renewal(identity))


def test_a_servers_certificate_is_not_renewed_as_a_clients(office):
    server = Identity.load(office.authority.issue_server(["localhost"]), clock=office.clock)
    with pytest.raises(AuthError, match="not a fedsea client's"):
        office.authority.renew(server.certificate_pem, make_request(certs.new_key(), "localhost"))


def test_a_damaged_journal_is_refused_with_its_line(office):
    office.approve("clinic")
    journal = office.folder / "ca" / "journal.jsonl"
    journal.write_bytes(b'{"event": "issu\n' + journal.read_bytes())
    with pytest.raises(StorageError, match=r"Line 1 .* backup"):
        office.authority.entries()


def test_a_missing_journal_is_refused(office):
    (office.folder / "ca" / "journal.jsonl").unlink()
    with pytest.raises(StorageError, match=r"journal\.jsonl"):
        office.approve("clinic")
