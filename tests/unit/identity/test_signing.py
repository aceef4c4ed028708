"""Statements that clients sign with their certificates' keys, and certificates that are no member's."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization

from fedsea.errors import AuthError
from fedsea.wire.identity import Authority
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.signing import CertificateVerifier, IdentityNotary
from tests.unit.identity.conftest import Office


def notary(office, name="bank"):
    return IdentityNotary(office.add(name), clock=office.clock)


def test_a_statement_is_verified_by_others_and_names_its_signer(office):
    own, other = notary(office), notary(office, "clinic")
    signature = own.sign(b"statement")
    assert other.name(own.certificate) == "bank"
    assert other.verify(own.certificate, b"statement", signature)
    assert not other.verify(own.certificate, b"another", signature)
    assert not other.verify(other.certificate, b"statement", signature)
    assert not other.verify(own.certificate, b"statement", b"\x30\x06\x02\x01\x01\x02\x01\x01")
    assert not other.verify(own.certificate, b"statement", b"junk")


def test_a_certificate_of_another_authority_is_refused(office, tmp_path):
    stranger = notary(Office(tmp_path / "elsewhere"))
    with pytest.raises(AuthError, match="not issued by the authority"):
        notary(office, "clinic").name(stranger.certificate)


def test_a_server_s_certificate_is_no_member_s(office):
    office.authority.issue_server(["127.0.0.1"], folder=office.folder / "server")
    pem = (office.folder / "server" / "certificate.pem").read_bytes()
    der = certs.certificate_from_pem(pem, "it").public_bytes(serialization.Encoding.DER)
    with pytest.raises(AuthError):
        notary(office).name(der)


def test_an_expired_certificate_is_refused(office):
    own = notary(office)
    verifier = CertificateVerifier(Authority.open(office.folder / "ca").ca_pem, clock=office.clock)
    assert verifier.name(own.certificate) == "bank"
    office.clock.move(days=4000)
    with pytest.raises(AuthError, match="expired"):
        verifier.name(own.certificate)


@pytest.mark.parametrize("damaged", [b"", b"no certificate", b"\x30\x82\x01\x00"])
def test_what_is_no_certificate_is_refused(office, damaged):
    with pytest.raises(AuthError, match="damaged"):
        notary(office).name(damaged)
