"""Signing requests: what a client sends to the operator instead of its key."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsea.errors import AuthError
from fedsea.wire.identity.certificates import check_name, key_fingerprint

_LARGEST_REQUEST_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class SigningRequest:
    """A request whose signature was checked.

    Attributes:
        name: The name that the client asks for.
        public_key: The client's key.
        fingerprint: SHA-256 of that key, which operator and client compare.
    """

    name: str
    public_key: ec.EllipticCurvePublicKey
    fingerprint: str


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A signing request in PEM form.

    Raises:
        ConfigError: No client may be called `name`.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> SigningRequest:
    """Read and check a request; extensions that it asks for are ignored.

    Raises:
        AuthError: It is damaged, not signed by its own key, or has another type of key.
        ConfigError: No client may be called as it asks.
    """
    request = None
    if len(pem) <= _LARGEST_REQUEST_BYTES:
        try:
            request = x509.load_pem_x509_csr(pem)
            signed = request.is_signature_valid
            key = request.public_key()
            names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        except Exception:  # noqa: BLE001 (whatever a foreign request makes the parser raise, it is no request)
            request = None
    if request is None:
        raise AuthError(
            "This is not a signing request in PEM form: ask the client for the file NAME.request.pem that `fedsea "
            "enroll` made."
        )
    if not signed:
        raise AuthError("The request is not signed by its own key, so it was changed on its way: ask for it again.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AuthError("The request's key is not ECDSA P-256: ask the client to make it with `fedsea enroll`.")
    if len(names) != 1:
        raise AuthError("The request does not name exactly one client: ask the client to make it with `fedsea enroll`.")
    return SigningRequest(check_name(str(names[0].value)), key, key_fingerprint(key))
