"""Who is at an end of a sealed stream: its own key and certificate, and what the other one shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import AuthError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.certificates import Clock, Role

_ECDSA = ec.ECDSA(hashes.SHA256())


class _Identity(Protocol):
    """What is needed of `wire.identity.Identity`."""

    @property
    def key_pem(self) -> bytes: ...

    @property
    def certificate_pem(self) -> bytes: ...

    @property
    def ca_pem(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SealingIdentity:
    """A side's key and certificate, read once.

    Attributes:
        key: The certificate's.
        certificate: In DER form.
        ca: The authority that both sides trust.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    ca: x509.Certificate

    @classmethod
    def of(cls, identity: _Identity) -> Self:
        """Read an identity.

        Raises:
            AuthError: It is damaged.
        """
        certificate = certs.certificate_from_pem(identity.certificate_pem, "This side's certificate")
        return cls(
            certs.key_from_pem(identity.key_pem, "This side's key"),
            certificate.public_bytes(serialization.Encoding.DER),
            certs.certificate_from_pem(identity.ca_pem, "The authority's certificate"),
        )

    def sign(self, text: bytes) -> bytes:
        """A signature that `signed` accepts."""
        return self.key.sign(text, _ECDSA)


def read_certificate(der: bytes, what: str) -> x509.Certificate:
    """What a peer shows; nothing but its form is checked.

    Raises:
        AuthError: It is no certificate as fedsea makes them.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        known = isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    except Exception:  # noqa: BLE001 (whatever a foreign certificate makes the parser raise, it is none of ours)
        known = False
    if not known:
        raise AuthError(f"{what} in a sealed handshake is not one as fedsea makes them: enrol again.")
    return certificate


def signed(certificate: x509.Certificate, signature: bytes, text: bytes) -> bool:
    """Whether the certificate's key made this signature of the text."""
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(signature, text, _ECDSA)
    except InvalidSignature:
        return False
    return True


def check_server(certificate: x509.Certificate, ca: x509.Certificate, clock: Clock) -> None:
    """Refuse whatever is not at this moment a server of our authority; a relay is none.

    Raises:
        AuthError: What it is instead.
    """
    if not certs.is_issued_by(certificate, ca):
        raise AuthError(
            "The server at the other end of the relay is not of the authority that this client trusts: check the "
            "address; if the operator made a new authority, enrol again."
        )
    if certs.role_of(certificate) is not Role.SERVER:
        raise AuthError(
            "What answers at the other end is not the server but another certificate of the federation, posing as it: "
            "tell the operator and do not connect."
        )
    now = clock()
    if now > min(certificate.not_valid_after_utc, ca.not_valid_after_utc):
        raise AuthError(
            f"The server's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: ask its "
            "operator to run `fedsea ca server`; if it is new, check this machine's clock."
        )
    if now < certificate.not_valid_before_utc:
        raise AuthError("The server's certificate is not valid yet by this machine's clock: set the clock.")
