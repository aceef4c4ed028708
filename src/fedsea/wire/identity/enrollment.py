"""How an identity comes about and stays alive: request, answer, and renewal before it expires."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedsea.errors import AuthError, ConfigError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity import files
from fedsea.wire.identity.certificates import Clock, Role
from fedsea.wire.identity.folder import (
    CA_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    NEXT_KEY_FILE,
    REQUEST_SUFFIX,
    fits,
    open_requests,
    read_key,
    switch_certificate,
)
from fedsea.wire.identity.identity import Identity, check_certificate
from fedsea.wire.identity.requests import make_request, read_request


@dataclass(frozen=True, slots=True)
class Enrollment:
    """A request that waits for the operator.

    Attributes:
        folder: The identity folder.
        name: The name that it asks for.
        csr_pem: The signing request.
        request_path: The same as a file, to be sent to the operator.
        fingerprint: SHA-256 of the public key; the operator must see the same one.
    """

    folder: Path
    name: str
    csr_pem: bytes
    request_path: Path
    fingerprint: str


def enroll(folder: Path, name: str, *, again: bool = False) -> Enrollment:
    """Make a key and a signing request for it; asked twice, the same key serves.

    Args:
        folder: Made if it is not there.
        name: What the client is to be called.
        again: Beside an identity that is already installed, make a new key; the old one stays until the answer to
            the new request is installed.

    Raises:
        ConfigError: No client may be called so, or the folder holds an identity and `again` is not set.
    """
    certs.check_name(name)
    files.make_folder(folder)
    with files.locked(folder):
        installed = (folder / CERTIFICATE_FILE).exists()
        if installed and not again:
            raise ConfigError(
                f"{folder} already holds an identity, which renews itself: use it, choose another folder, or ask for a "
                "new key and certificate with `--again`."
            )
        csr_pem = _request(folder / (NEXT_KEY_FILE if installed else KEY_FILE), name)
        path = folder / f"{name}{REQUEST_SUFFIX}"
        files.write_public(path, csr_pem)
        _remove(other for other in open_requests(folder) if other != path)
    return Enrollment(folder, name, csr_pem, path, read_request(csr_pem).fingerprint)


def install(
    folder: Path,
    certificate_pem: bytes,
    ca_pem: bytes | None,
    expected_ca_fingerprint: str,
    *,
    clock: Clock = certs.utc_now,
) -> Identity:
    """Install the operator's answer to this folder's request.

    Args:
        folder: The folder that `enroll` made the key in.
        certificate_pem: The certificate; the authority's may follow it.
        ca_pem: The authority's certificate; None takes the last one of `certificate_pem`.
        expected_ca_fingerprint: What the operator said in person or by telephone.
        clock: Gives the time.

    Raises:
        AuthError: Another authority than expected, a certificate for another key, or one that is not valid now.
        ConfigError: The fingerprint is not one, or the folder has no key.
    """
    certificate = certs.certificate_from_pem(certificate_pem, "The certificate")
    ca = certs.certificate_from_pem(ca_pem or _last_block(certificate_pem), "The authority's certificate")
    found = certs.certificate_fingerprint(ca)
    if not certs.same_fingerprint(found, expected_ca_fingerprint):
        raise AuthError(
            f"The authority's fingerprint is {found}, not the expected one, so somebody else may have issued this: "
            "install nothing and ask the operator over another way."
        )
    if not certs.is_issued_by(ca, ca):
        raise AuthError("The authority's certificate is not one: ask the operator for the file ca.pem.")
    check_certificate(certificate, ca, clock())
    certs.relay_name(certificate) if certs.role_of(certificate) is Role.RELAY else certs.client_name(certificate)
    with files.locked(folder):
        _require_key(folder, certificate)
        _require_answer(folder, certificate)
        files.write_public(folder / CA_FILE, certs.certificate_to_pem(ca))
        switch_certificate(folder, certificate)
        _remove(open_requests(folder))
    return Identity.load(folder, clock=clock)


def begin_renewal(identity: Identity) -> bytes:
    """Make the next key and a signing request for it; asked twice, the same key serves.

    Returns:
        The request, for `Authority.renew`.
    """
    with files.locked(identity.folder):
        return _request(identity.folder / NEXT_KEY_FILE, identity.name)


def finish_renewal(identity: Identity, certificate_pem: bytes, *, clock: Clock = certs.utc_now) -> Identity:
    """Put the renewed certificate and its key in the place of the old ones, in one step.

    Raises:
        AuthError: It is of another authority, for another name or key, or not valid now; the old pair stays.
    """
    certificate = certs.certificate_from_pem(certificate_pem, "The renewed certificate")
    ca = certs.certificate_from_pem(identity.ca_pem, "The authority's certificate")
    check_certificate(certificate, ca, clock())
    if certs.client_name(certificate) != identity.name:
        raise AuthError("The renewed certificate is for another name: the old one stays; tell the operator.")
    with files.locked(identity.folder):
        _require_key(identity.folder, certificate)
        switch_certificate(identity.folder, certificate)
    return Identity.load(identity.folder, clock=clock)


def _request(key_path: Path, name: str) -> bytes:
    """A request for the key in `key_path`, which is made if it is not there and never overwritten."""
    if not key_path.exists():
        files.write_private(key_path, certs.key_to_pem(certs.new_key()))
    return make_request(read_key(key_path), name)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _require_key(folder: Path, certificate: x509.Certificate) -> None:
    paths = [path for path in (folder / NEXT_KEY_FILE, folder / KEY_FILE) if path.exists()]
    if not any(fits(read_key(path), certificate) for path in paths):
        raise AuthError(
            f"The certificate does not answer the request in {folder}: install the one that belongs to it, or enrol "
            "again."
        )


def _require_answer(folder: Path, certificate: x509.Certificate) -> None:
    """Refuse the certificate that is installed already while the answer to a later request is awaited."""
    requests, installed, key = open_requests(folder), folder / CERTIFICATE_FILE, folder / NEXT_KEY_FILE
    if not (requests and installed.exists() and key.exists()) or fits(read_key(key), certificate):
        return
    if certs.certificate_from_pem(installed.read_bytes(), "The certificate") == certificate:
        raise AuthError(
            f"This certificate is installed in {folder} already: install the one that the operator made of "
            f"{requests[0].name}."
        )


def _last_block(pem: bytes) -> bytes:
    begin = pem.rfind(b"-----BEGIN CERTIFICATE-----")
    return pem[max(begin, 0) :]
