"""What a fedsea certificate is, and how one is read and checked. ECDSA P-256 throughout.

A client's certificate carries its name twice, as common name and as the URI `fedsea:client:<name>`, and may only
be used by a TLS client; a server's carries host names and addresses and may only be used by a TLS server. A relay's,
where TLS ends on the way, carries its name as a client's does, may be used by both, and is for one host name that no
server has: whoever expects a server there finds out from TLS itself that it is not.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter, ValidationError

from fedsea.errors import AuthError, ConfigError
from fedsea.plan import ClientName

Clock = Callable[[], datetime]
"""Gives the time, with its zone."""

_LARGEST_PEM_BYTES = 64 << 10
_NAME = TypeAdapter[str](ClientName)


class Role(enum.StrEnum):
    """What a certificate may be used for."""

    CLIENT = "client"
    SERVER = "server"
    RELAY = "relay"


PURPOSES = {
    Role.CLIENT: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.SERVER: (ExtendedKeyUsageOID.SERVER_AUTH,),
    Role.RELAY: (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
}
"""Role to the extended key usages of its certificates."""

NAMED_ROLES = (Role.CLIENT, Role.RELAY)
"""Roles whose certificates carry a name that was asked for; a name has one of them only."""


def name_uri(role: Role, name: str) -> str:
    """The URI in a client's or relay's certificate."""
    return f"fedsea:{role.value}:{name}"


def utc_now() -> datetime:
    """The clock that is used where none is injected."""
    return datetime.now(UTC)


def check_name(name: str) -> str:
    """Return `name` if a client may be called so.

    Raises:
        ConfigError: It does not follow the pattern of client names.
    """
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name[:80]!r} cannot be a client's name: use 1 to 63 lower-case letters, digits, dots, dashes or "
            "underscores, beginning with a letter or digit."
        ) from None


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8, unencrypted; the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """Read a key that `key_to_pem` wrote.

    Raises:
        AuthError: It is no P-256 key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AuthError(f"{where} is not a P-256 private key as fedsea makes them: restore the file or enrol again.")
    return key


def certificate_from_pem(pem: bytes, where: str) -> x509.Certificate:
    """Read the first certificate of a PEM text.

    Raises:
        AuthError: There is none, or it is damaged.
    """
    if len(pem) <= _LARGEST_PEM_BYTES:
        try:
            return x509.load_pem_x509_certificate(pem)
        except (ValueError, x509.InvalidVersion):
            pass
    raise AuthError(
        f"{where} is not a certificate in PEM form: copy the whole file again, with its BEGIN and END lines."
    )


def certificate_to_pem(certificate: x509.Certificate) -> bytes:
    """One PEM block."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _colons(digest: bytes) -> str:
    return digest.hex(":").upper()


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the whole certificate, as `AB:12:…`; identifies a CA."""
    return _colons(certificate.fingerprint(hashes.SHA256()))


def key_fingerprint(key: object) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo), as `AB:12:…`; the same in request and certificate."""
    assert isinstance(key, ec.EllipticCurvePublicKey)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return _colons(digest.finalize())


def same_fingerprint(found: str, expected: str) -> bool:
    """Compare a fingerprint with one that a person typed: case, colons and spaces do not matter.

    Raises:
        ConfigError: `expected` is no SHA-256 fingerprint.
    """
    plain = "".join(expected.replace(":", "").split()).lower().removeprefix("sha256")
    if len(plain) != 64 or not set(plain) <= set("0123456789abcdef"):
        raise ConfigError(
            "The fingerprint must be 64 hexadecimal digits like AB:12:…; copy it whole from what the other side shows."
        )
    return found.replace(":", "").lower() == plain


def serial_text(certificate: x509.Certificate) -> str:
    """The serial number in lower-case hex, as journal and lists show it."""
    return f"{certificate.serial_number:040x}"


def role_of(certificate: x509.Certificate) -> Role | None:
    """The one use that a certificate states, whose issuer was checked; None for a CA."""
    try:
        purposes = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    roles = [role for role, allowed in PURPOSES.items() if purposes == set(allowed)]
    return roles[0] if roles and not constraints.ca else None


def client_name(certificate: x509.Certificate) -> str:
    """The client's name, which common name and URI must agree on.

    Raises:
        AuthError: This is no client's certificate.
    """
    if (name := _name_as(Role.CLIENT, certificate)) is not None:
        return name
    raise AuthError(
        "This certificate is not a fedsea client's: use the identity folder that `fedsea enroll` made and the "
        "operator approved."
    )


def relay_name(certificate: x509.Certificate) -> str:
    """The same of a relay.

    Raises:
        AuthError: This is no relay's certificate.
    """
    if (name := _name_as(Role.RELAY, certificate)) is not None:
        return name
    raise AuthError("This certificate is not a relay's: the operator makes one with `fedsea ca approve --role relay`.")


def _name_as(role: Role, certificate: x509.Certificate) -> str | None:
    if role_of(certificate) is not role:
        return None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = alternative.get_values_for_type(x509.UniformResourceIdentifier)
    if len(names) != 1 or uris != [name_uri(role, str(names[0].value))]:
        return None
    return str(names[0].value)


def host_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Host names and addresses of a server's certificate, in their order."""
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in alternative)


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the CA signed this certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
