"""Statements that clients sign with their certificates' keys, for each other: the server passes them on only."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import AuthError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.certificates import Clock
from fedsea.wire.identity.identity import Identity, check_certificate

_ALGORITHM = ec.ECDSA(hashes.SHA256())


class CertificateVerifier:
    """Checks other clients' certificates and signatures by the federation's authority.

    Revocation is known to the authority's operator only, who does not let revoked clients connect.

    Args:
        ca_pem: The authority.
        clock: Gives the time, for expiry.
    """

    def __init__(self, ca_pem: bytes, *, clock: Clock = certs.utc_now) -> None:
        self._ca = certs.certificate_from_pem(ca_pem, "The authority's certificate")
        self._clock = clock

    def name(self, certificate: bytes) -> str:
        """The client that a certificate (DER) names.

        Raises:
            AuthError: It is not a client's of this authority, or not valid now.
        """
        found = _read(certificate)
        check_certificate(found, self._ca, self._clock())
        return certs.client_name(found)

    def verify(self, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether the key of the certificate signed the statement."""
        key = _read(certificate).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        try:
            key.verify(signature, statement, _ALGORITHM)
        except InvalidSignature:
            return False
        return True


class IdentityNotary(CertificateVerifier):
    """Signs as one client.

    Args:
        identity: Whose key signs; a renewed one needs a new notary.
        clock: Gives the time.

    Attributes:
        certificate: DER.
    """

    def __init__(self, identity: Identity, *, clock: Clock = certs.utc_now) -> None:
        super().__init__(identity.ca_pem, clock=clock)
        own = certs.certificate_from_pem(identity.certificate_pem, "This client's certificate")
        self.certificate = own.public_bytes(serialization.Encoding.DER)
        self._key = certs.key_from_pem(identity.key_pem, "This client's key")

    def sign(self, statement: bytes) -> bytes:
        """A signature by the identity's key."""
        return self._key.sign(statement, _ALGORITHM)


def _read(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(certificate)
    except (ValueError, x509.InvalidVersion):
        raise AuthError("A member's certificate is damaged: enrol that client again.") from None
