"""The side that holds a key: a client's or server's identity, in a folder.

identity/key.pem          the private key, mode 0600; never leaves this machine
identity/certificate.pem  what the operator's authority issued for it
identity/ca.pem           the authority that both sides trust
identity/NAME.request.pem a signing request that is still to be answered
identity/key.next.pem     the key of a renewal under way
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from cryptography import x509

from fedsea.errors import AuthError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity import files
from fedsea.wire.identity.certificates import Clock, Role
from fedsea.wire.identity.folder import (
    CA_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    finish_switch,
    fits,
    open_requests,
    read_key,
)

RENEWAL_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Identity:
    """A key with its certificate, checked and ready for TLS.

    Attributes:
        folder: Where it was loaded from.
        role: Client, server or relay.
        name: The client's or relay's name; a server's first host name.
        key_pem: The private key.
        certificate_pem: The certificate chain.
        ca_pem: The authority.
        serial: Serial number in hex.
        not_before: Beginning of the certificate's validity.
        not_after: End of it.
        fingerprint: SHA-256 of the public key, as shown when it was approved.
        ca_fingerprint: SHA-256 of the authority's certificate.
    """

    folder: Path
    role: Role
    name: str
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    serial: str
    not_before: datetime
    not_after: datetime
    fingerprint: str
    ca_fingerprint: str

    @classmethod
    def load(cls, folder: Path, *, clock: Clock = certs.utc_now) -> Self:
        """Load and check an identity.

        Raises:
            ConfigError: A file is missing.
            AuthError: The key is readable by others or does not fit, or the certificate is damaged, of another
                authority, expired, or not yet valid.
        """
        if requests := open_requests(folder):
            missing = f"send {requests[0]} to the operator, then run `fedsea enroll --install` with the answer."
        else:
            missing = (
                "make an identity with `fedsea enroll` (a server's with `fedsea ca server`), or give its folder "
                "(--identity)."
            )
        ca = _read_certificate(folder / CA_FILE, missing)
        certificate = _read_certificate(folder / CERTIFICATE_FILE, missing)
        key = read_key(folder / KEY_FILE)
        key_pem = certs.key_to_pem(key)
        if not fits(key, certificate):
            with files.locked(folder):  # either a renewal is being written at this moment, or one was cut short
                certificate = _read_certificate(folder / CERTIFICATE_FILE, missing)
                key_pem = finish_switch(folder, certificate)
        check_certificate(certificate, ca, clock())
        return cls._of(folder, key_pem, certificate, ca)

    def check_role(self, role: Role) -> None:
        """Refuse to be used as what this identity is not.

        Raises:
            AuthError: It has another role.
        """
        if self.role is not role:
            way = "`fedsea ca server`" if role is Role.SERVER else "`fedsea enroll`"
            raise AuthError(
                f"{self.folder} holds the identity of the {self.role.value} {self.name}, not of a {role.value}: give "
                f"the folder that {way} made (--identity)."
            )

    @classmethod
    def _of(cls, folder: Path, key_pem: bytes, certificate: x509.Certificate, ca: x509.Certificate) -> Self:
        role = certs.role_of(certificate)
        if role is None:
            raise AuthError(f"{folder / CERTIFICATE_FILE} is not a fedsea certificate: install it again.")
        name_of = {Role.CLIENT: certs.client_name, Role.RELAY: certs.relay_name}
        name = name_of[role](certificate) if role in name_of else certs.host_names(certificate)[0]
        return cls(
            folder=folder,
            role=role,
            name=name,
            key_pem=key_pem,
            certificate_pem=certs.certificate_to_pem(certificate),
            ca_pem=certs.certificate_to_pem(ca),
            serial=certs.serial_text(certificate),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            fingerprint=certs.key_fingerprint(certificate.public_key()),
            ca_fingerprint=certs.certificate_fingerprint(ca),
        )


def needs_renewal(identity: Identity, now: datetime) -> bool:
    """Whether less than a third of the certificate's life remains."""
    life = identity.not_after - identity.not_before
    return identity.not_after - now < life * RENEWAL_SHARE


def check_certificate(certificate: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
    """Refuse a certificate of another authority, and one that is not valid at the moment.

    Raises:
        AuthError: What is wrong, and how to mend it.
    """
    if not certs.is_issued_by(certificate, ca):
        raise AuthError(
            "The certificate was not issued by the authority beside it (ca.pem): install both again as the operator "
            "sent them."
        )
    if now > min(certificate.not_valid_after_utc, ca.not_valid_after_utc):
        raise AuthError(
            f"The certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: a client runs `fedsea "
            "enroll --name NAME --again` and sends the request to the operator, a server's operator runs `fedsea ca "
            "server`."
        )
    if now < certificate.not_valid_before_utc:
        raise AuthError(
            f"The certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and this "
            f"machine's clock says {now:%Y-%m-%d %H:%M} UTC: set the clock."
        )


def _read_certificate(path: Path, missing: str) -> x509.Certificate:
    return certs.certificate_from_pem(files.read_file(path, missing), str(path))
