"""Building certificates: the authority's own, and those that it signs."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsea.errors import ConfigError
from fedsea.wire.address import RELAY_HOST
from fedsea.wire.identity.certificates import PURPOSES, Role, name_uri

SKEW = timedelta(minutes=5)
"""Certificates begin this much in the past, for peers whose clocks are behind."""


def authority_certificate(key: ec.EllipticCurvePrivateKey, name: str, now: datetime, days: int) -> x509.Certificate:
    """A self-signed CA that may sign leaf certificates only."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def leaf_certificate(
    role: Role,
    names: Sequence[str],
    public_key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: float,
) -> x509.Certificate:
    """A certificate of a client or server, never longer valid than its CA.

    Args:
        role: What it may be used for.
        names: The client's or relay's name, or the server's host names and addresses.
        public_key: Of its owner.
        authority: The CA's certificate.
        authority_key: The CA's key.
        now: Beginning of its validity, before the allowance for slow clocks.
        days: How long it is valid.
    """
    alternative: list[x509.GeneralName]
    if role is Role.SERVER:
        common_name, alternative = "fedsea server", [_host(name) for name in names]
    else:
        (common_name,) = names
        alternative = [x509.UniformResourceIdentifier(name_uri(role, common_name))]
        if role is Role.RELAY:
            alternative.append(x509.DNSName(RELAY_HOST))
    end = min(now + timedelta(days=days), authority.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(subject, authority.subject, public_key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(PURPOSES[role]), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        encoded = name.encode("idna").decode()
    except UnicodeError:
        encoded = ""
    labels = encoded.split(".")
    if encoded.lower().endswith(RELAY_HOST):
        raise ConfigError(f"{RELAY_HOST} is the host name of relays, never of a server: give another one.")
    if not all(label and label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise ConfigError(
            f"{name[:80]!r} is neither a host name nor an address: give it as clients will type it, without port."
        )
    return x509.DNSName(encoded)
