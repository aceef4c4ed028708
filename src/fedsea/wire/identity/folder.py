"""How key and certificate are kept so that a kill never leaves a pair that does not fit.

The certificate is the switch: the new key is written beside the old one, then the certificate is replaced in one
rename, then the new key takes the old one's place. A reader that finds the certificate fitting the next key does
the last rename itself.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import AuthError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity import files

KEY_FILE = "key.pem"
NEXT_KEY_FILE = "key.next.pem"
CERTIFICATE_FILE = "certificate.pem"
CA_FILE = "ca.pem"
REQUEST_SUFFIX = ".request.pem"
"""Of a request that waits for its answer; the client's name stands before it, so that operators can tell them apart."""


def open_requests(folder: Path) -> list[Path]:
    """Requests in an identity folder that are still to be answered."""
    return sorted(folder.glob(f"*{REQUEST_SUFFIX}"))


def write_new_pair(folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Replace key and certificate; call it with the folder's lock held."""
    files.write_private(folder / NEXT_KEY_FILE, certs.key_to_pem(key))
    switch_certificate(folder, certificate)


def switch_certificate(folder: Path, certificate: x509.Certificate) -> None:
    """Put in place a certificate whose key is in the folder; call it with the folder's lock held."""
    files.write_public(folder / CERTIFICATE_FILE, certs.certificate_to_pem(certificate))
    finish_switch(folder, certificate)


def finish_switch(folder: Path, certificate: x509.Certificate) -> bytes:
    """Finish a switch that may have been cut short; call it with the folder's lock held.

    Returns:
        The key that fits the certificate, in PEM form.

    Raises:
        AuthError: Neither key in the folder fits, or one is readable by others.
    """
    if (folder / NEXT_KEY_FILE).exists() and fits(read_key(folder / NEXT_KEY_FILE), certificate):
        files.rename(folder / NEXT_KEY_FILE, folder / KEY_FILE)
    key = read_key(folder / KEY_FILE)
    if not fits(key, certificate):
        raise AuthError(
            f"The certificate does not belong to the key in {folder}: install the one that answers this folder's own "
            "request, or enrol again."
        )
    return certs.key_to_pem(key)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A key of the folder.

    Raises:
        AuthError: It is damaged, or others can read it.
        ConfigError: There is none.
    """
    return certs.key_from_pem(
        files.read_private(path, "make one with `fedsea enroll`, or give the identity's folder."), str(path)
    )


def fits(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    """Whether the certificate is for this key."""
    try:
        return key.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
