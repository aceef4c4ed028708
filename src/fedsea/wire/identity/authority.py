"""The operator's side: a certificate authority in a folder.

    ca/ca.key.pem       the authority's key, mode 0600
    ca/ca.pem           its certificate; its fingerprint is what clients are told out of band
    ca/journal.jsonl    everything that was issued and revoked; the server reads it to admit or refuse
    ca/server/          the server's identity

A certificate leaves this module only after the journal names it durably, so whatever exists can be revoked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import AuthError, ConfigError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity import files
from fedsea.wire.identity.building import authority_certificate, leaf_certificate
from fedsea.wire.identity.certificates import Clock, Role
from fedsea.wire.identity.folder import CA_FILE, CERTIFICATE_FILE, write_new_pair
from fedsea.wire.identity.journal import (
    FILE_NAME,
    Entry,
    Record,
    append_line,
    create_journal,
    issued_line,
    read_journal,
    revoked_line,
)
from fedsea.wire.identity.renewal import check_renewal
from fedsea.wire.identity.requests import SigningRequest, read_request

CA_KEY_FILE = "ca.key.pem"
SERVER_FOLDER = "server"


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate for a client.

    Attributes:
        pem: The client's certificate followed by the CA's.
        name: The client's name.
        serial: Serial number in hex.
        not_after: End of its validity.
    """

    pem: bytes
    name: str
    serial: str
    not_after: datetime


class Authority:
    """Issues and revokes certificates; open one with `create` or `open`.

    Its methods block on the disk: call them from a thread where an event loop runs.
    """

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, clock: Clock
    ) -> None:
        self.folder = folder
        self._certificate = certificate
        self._key = key
        self._clock = clock

    @classmethod
    def create(cls, folder: Path, name: str, *, days: int = 3650, clock: Clock = certs.utc_now) -> Self:
        """Make a new authority.

        Args:
            folder: Made if it is not there.
            name: Shown in its certificate, such as the federation's name.
            days: Validity of the authority itself.
            clock: Gives the time.

        Raises:
            ConfigError: The folder already holds one, or the name is empty or too long.
        """
        if not 0 < len(name) <= 64:
            raise ConfigError("The authority's name must have 1 to 64 characters.")
        files.make_folder(folder)
        with files.locked(folder):
            journal = folder / FILE_NAME
            if (folder / CA_FILE).exists() or (journal.exists() and journal.stat().st_size):
                raise ConfigError(f"{folder} already holds an authority: use it, or choose another folder.")
            key = certs.new_key()
            certificate = authority_certificate(key, name, clock(), days)
            files.write_private(folder / CA_KEY_FILE, certs.key_to_pem(key))
            create_journal(journal)
            files.write_public(folder / CA_FILE, certs.certificate_to_pem(certificate))  # last: makes it complete
        return cls(folder, certificate, key, clock)

    @classmethod
    def open(cls, folder: Path, *, clock: Clock = certs.utc_now) -> Self:
        """Open an authority that `create` made.

        Raises:
            ConfigError: There is none.
            AuthError: Its key is readable by others, or does not belong to its certificate.
        """
        missing = "make an authority with `fedsea ca init`, or give its folder."
        pem = files.read_file(folder / CA_FILE, missing)
        certificate = certs.certificate_from_pem(pem, str(folder / CA_FILE))
        key_path = folder / CA_KEY_FILE
        key = certs.key_from_pem(files.read_private(key_path, missing), str(key_path))
        if certificate.public_key() != key.public_key():
            raise AuthError(f"{key_path} does not belong to {folder / CA_FILE}: restore both from the same backup.")
        return cls(folder, certificate, key, clock)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate, `AB:12:…`; tell it to clients by telephone or in person."""
        return certs.certificate_fingerprint(self._certificate)

    @property
    def ca_pem(self) -> bytes:
        """The CA's certificate."""
        return certs.certificate_to_pem(self._certificate)

    def issue_server(self, hostnames: Sequence[str] = (), *, days: float = 30, folder: Path | None = None) -> Path:
        """Make a server identity: a fresh key, and a certificate for it.

        Args:
            hostnames: Names and addresses that clients will type; empty takes those of the identity in `folder`.
            days: Validity.
            folder: Identity folder; `server` inside the authority's by default. One that exists is replaced.

        Returns:
            The identity folder.

        Raises:
            ConfigError: No host name, or one that is neither a name nor an address.
        """
        folder = folder or self.folder / SERVER_FOLDER
        hostnames = list(dict.fromkeys(hostnames)) or self._host_names_in(folder)
        key = certs.new_key()
        with files.locked(self.folder):
            certificate, _ = self._issue(Role.SERVER, hostnames, key.public_key(), days)
        files.make_folder(folder)
        with files.locked(folder):
            files.write_public(folder / CA_FILE, self.ca_pem)
            write_new_pair(folder, key, certificate)
        return folder

    def inspect(
        self, csr_pem: bytes, *, name: str | None = None, again: bool = True
    ) -> tuple[SigningRequest, list[Entry]]:
        """Check a request, and list the valid certificates that the name it asks for, or `name`, already has.

        Args:
            csr_pem: The request.
            name: Another name than the request asks for.
            again: As for `approve`; False refuses a name that was revoked here already.

        Raises:
            AuthError: The request is damaged or unsigned, its key has another type, or `approve` would refuse the name.
        """
        request, now, record = read_request(csr_pem), self._clock(), self._read()
        _check_not_revoked(record, name or request.name, again)
        valid = [entry for entry in record.named(name or request.name) if entry.status(now) == "valid"]
        return request, valid

    def approve(
        self,
        csr_pem: bytes,
        *,
        name: str | None = None,
        days: float = 30,
        again: bool = False,
        role: Role = Role.CLIENT,
    ) -> ClientCertificate:
        """Issue a client's or relay's certificate. Compare the request's fingerprint with its maker's first.

        Args:
            csr_pem: The request.
            name: Another name than the request asks for.
            days: Validity.
            again: Admit a name that was revoked; its old certificates stay revoked.
            role: Client, or relay: a machine on the way where TLS ends, which may pass sealed streams on and nothing
                else.

        Raises:
            AuthError: The request is not sound, or the name was revoked and `again` is not set.
            ConfigError: No client may have this name, or the other role has it.
        """
        request = read_request(csr_pem)
        name = certs.check_name(name or request.name)
        with files.locked(self.folder):
            record = self._read()
            _check_not_revoked(record, name, again)
            _check_role(record, name, role)
            certificate, serial = self._issue(role, [name], request.public_key, days)
        return self._client_certificate(certificate, name, serial)

    def renew(self, current_pem: bytes, csr_pem: bytes, *, days: float = 30) -> ClientCertificate:
        """Issue the next certificate to a client that proved in TLS that it holds its current one.

        The same request again is answered with the certificate of the first time.

        Args:
            current_pem: The certificate of the connection.
            csr_pem: A request for the same name.
            days: Validity of the new certificate.

        Raises:
            AuthError: The current certificate is foreign, unknown, expired or revoked, the request is for another
                name, or it is too early or too often.
        """
        request, now = read_request(csr_pem), self._clock()
        current = certs.certificate_from_pem(current_pem, "The connection's certificate")
        if not certs.is_issued_by(current, self._certificate):
            raise AuthError("The connection's certificate was not issued by this federation's authority: enrol again.")
        name, serial = certs.client_name(current), certs.serial_text(current)
        with files.locked(self.folder):
            known = check_renewal(self._read(), name, serial, request, now)
            if known is not None:
                return self._client_certificate(_certificate_of(known), name, known.serial)
            certificate, serial = self._issue(Role.CLIENT, [name], request.public_key, days, renewed_from=serial)
        return self._client_certificate(certificate, name, serial)

    def revoke(self, name_or_serial: str, reason: str = "") -> list[Entry]:
        """Revoke every certificate of a client, or one by its serial with those renewed from it.

        Running servers notice within seconds.

        Returns:
            The certificates that this revoked.

        Raises:
            ConfigError: No client certificate has this name or serial.
        """
        with files.locked(self.folder):
            record = self._read()
            line = self._revocation(record, name_or_serial, reason)
            before = {entry.serial for entry in record.entries.values() if entry.revoked is None}
            append_line(self.folder / FILE_NAME, line)
            record.apply(line)
        return [entry for entry in record.entries.values() if entry.serial in before and entry.revoked is not None]

    def entries(self) -> list[Entry]:
        """Everything issued, in order; `entry.status(now)` says how it stands."""
        return list(self._read().entries.values())

    def _read(self) -> Record:
        return read_journal(self.folder / FILE_NAME)

    def _revocation(self, record: Record, name_or_serial: str, reason: str) -> dict[str, Any]:
        now = self._clock()
        if record.named(name_or_serial):
            return revoked_line(name_or_serial, "", reason, now)
        entry = record.entries.get(name_or_serial.replace(":", "").lower())
        if entry is None:
            raise ConfigError(
                f"No client certificate has the name or serial {name_or_serial[:80]!r}: `fedsea ca list` "
                "shows them all."
            )
        if entry.role not in certs.NAMED_ROLES:
            raise ConfigError(
                "This certificate is the server's, and clients do not read the journal: replace it with `fedsea ca "
                "server`, and if its key was stolen make a new authority."
            )
        return revoked_line(entry.name, entry.serial, reason, now)

    def _issue(
        self,
        role: Role,
        names: Sequence[str],
        key: ec.EllipticCurvePublicKey,
        days: float,
        renewed_from: str = "",
    ) -> tuple[x509.Certificate, str]:
        now = self._clock()
        if days <= 0:
            raise ConfigError("A certificate must be valid for more than 0 days.")
        if now >= self._certificate.not_valid_after_utc:
            raise AuthError("The authority itself has expired: make a new one with `fedsea ca init` and enrol again.")
        certificate = leaf_certificate(role, names, key, self._certificate, self._key, now, days)
        entry = Entry(
            role=role,
            name=",".join(names),
            serial=certs.serial_text(certificate),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            key=certs.key_fingerprint(key),
            pem=certs.certificate_to_pem(certificate).decode(),
            renewed_from=renewed_from,
        )
        append_line(self.folder / FILE_NAME, issued_line(entry, now.astimezone(UTC)))
        return certificate, entry.serial

    def _client_certificate(self, certificate: x509.Certificate, name: str, serial: str) -> ClientCertificate:
        pem = certs.certificate_to_pem(certificate) + self.ca_pem
        return ClientCertificate(pem, name, serial, certificate.not_valid_after_utc)

    def _host_names_in(self, folder: Path) -> list[str]:
        path = folder / CERTIFICATE_FILE
        pem = files.read_file(path, "say for which host names the certificate is to be, with `--host`.")
        certificate = certs.certificate_from_pem(pem, str(path))
        if certs.role_of(certificate) is not Role.SERVER:
            raise ConfigError(f"{path} is not a server's certificate: choose another folder for the server's identity.")
        return list(certs.host_names(certificate))


def _check_not_revoked(record: Record, name: str, again: bool) -> None:
    if name in record.revoked_names and not again:
        raise AuthError(f"{name} was revoked: approve it with `--again` if it is to take part again under a new key.")


def _check_role(record: Record, name: str, role: Role) -> None:
    if role not in certs.NAMED_ROLES:
        raise ConfigError("A request is approved for a client or a relay; a server's identity is made here.")
    if others := [entry for entry in record.named(name) if entry.role is not role]:
        raise ConfigError(
            f"{name} is the name of a {others[0].role.value} here: a {role.value} needs another name, so that it can "
            "be revoked by it alone."
        )


def _certificate_of(entry: Entry) -> x509.Certificate:
    return certs.certificate_from_pem(entry.pem.encode(), "The journal's certificate")
