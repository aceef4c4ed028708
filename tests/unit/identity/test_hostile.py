"""Bytes from strangers end in an error that says what to do, never in one that nobody foresaw."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.errors import AuthError, ConfigError
from fedsea.wire.identity import Authority, PeerGate, enroll, install
from fedsea.wire.identity.requests import read_request

SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")  # cryptography's, of a changed one
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


def changed(der: bytes, changes: list[tuple[int, int]], kind: str) -> bytes:
    data = bytearray(der)
    for at, value in changes:
        data[at % len(data)] = value
    body = base64.encodebytes(bytes(data))
    return f"-----BEGIN {kind}-----\n".encode() + body + f"-----END {kind}-----\n".encode()


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> tuple[Path, bytes, bytes, Authority]:
    """Folder of a client that waits for its certificate, its certificate and request as DER, and the authority."""
    folder = tmp_path_factory.mktemp("hostile")
    authority = Authority.create(folder / "ca", "test")
    csr_pem = enroll(folder / "clinic", "clinic").csr_pem
    certificate = x509.load_pem_x509_certificate(authority.approve(csr_pem).pem)
    request = x509.load_pem_x509_csr(csr_pem)
    der = serialization.Encoding.DER
    return folder, certificate.public_bytes(der), request.public_bytes(der), authority


@SETTINGS
@given(changes=CHANGES)
def test_a_changed_certificate_is_refused_by_the_gate_and_at_installation(scene, changes):
    folder, der, _, authority = scene
    pem = changed(der, changes, "CERTIFICATE")
    if x509_equal(pem, der):
        return
    with pytest.raises(AuthError):
        PeerGate(folder / "ca").check(pem)
    with pytest.raises(AuthError):
        install(folder / "clinic", pem, authority.ca_pem, authority.fingerprint)


@SETTINGS
@given(changes=CHANGES)
def test_a_changed_request_is_refused_or_read(scene, changes):
    with contextlib.suppress(AuthError, ConfigError):
        read_request(changed(scene[2], changes, "CERTIFICATE REQUEST"))


@SETTINGS
@given(data=st.binary(max_size=300))
def test_bytes_that_are_nothing_are_refused(scene, data):
    folder, _, _, authority = scene
    with pytest.raises(AuthError):
        PeerGate(folder / "ca").check(data)
    with pytest.raises(AuthError):
        authority.renew(data, data)


def x509_equal(pem: bytes, der: bytes) -> bool:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1])) == der
