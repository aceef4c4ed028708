"""Why a connection failed, found out with plain sockets and one TLS handshake of our own.

gRPC reports one word, UNAVAILABLE, for a misspelt host, a closed port and a foreign certificate alike. This module
goes the same way once more, step by step, and returns the sentence for the step that does not work.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from typing import Any

from fedsea.errors import AuthError, FedseaError, TransportError
from fedsea.wire.address import split_address, through_relay, tls_name
from fedsea.wire.identity.folder import CERTIFICATE_FILE, KEY_FILE
from fedsea.wire.identity.identity import Identity

# Names of OpenSSL's X509_V_ERR_… codes, which the ssl module gives as numbers only.
_NOT_YET_VALID, _EXPIRED = 9, 10
_PURPOSE = 26
_OTHER_HOST = (62, 64)

# A server that speaks HTTP/2 and accepts our certificate answers this with its own SETTINGS frame.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")

_Addresses = list[tuple[socket.AddressFamily, Any]]


def diagnose(address: str, identity: Identity, timeout_s: float = 10.0) -> FedseaError:
    """Find out why a connection to a server failed.

    Args:
        address: `HOST:PORT` of the server.
        identity: Ours.
        timeout_s: Longest time that the whole examination takes.

    Returns:
        An error, not raised, whose sentence says what to do: `TransportError` where trying again may help,
        `AuthError` for anything about certificates, `ConfigError` for an address that is none.
    """
    deadline = time.monotonic() + timeout_s
    error = _go(address, identity, deadline)
    # Nobody tries again after an AuthError, so a server that was just stopping must not cause one: look twice.
    return _go(address, identity, deadline) if isinstance(error, AuthError) else error


def unreachable(address: str, timeout_s: float = 2.0) -> FedseaError | None:
    """Why no connection to a server comes up, as far as a plain socket can tell; None if one does.

    Where gRPC would go through a proxy of the environment, nothing is tried.

    Args:
        address: `HOST:PORT` of the server.
        timeout_s: Longest time that this takes.
    """
    if any(os.environ.get(name) for name in _PROXIES):
        return None
    deadline = time.monotonic() + timeout_s
    try:
        host, port = split_address(address)
        _connect(_resolve(host, port, deadline), address, deadline).close()
    except FedseaError as error:
        return error
    return None


def _go(address: str, identity: Identity, deadline: float) -> FedseaError:
    """Go the client's way once, to the step that does not work."""
    try:
        host, port = split_address(address)
        with _connect(_resolve(host, port, deadline), address, deadline) as plain:
            return _examine_tls(plain, tls_name(address), address, identity, deadline)
    except FedseaError as error:
        return error
    except OSError as error:
        return TransportError(
            f"The connection to {address} broke ({error.strerror or type(error).__name__}): check the network and that "
            "the server is running, then try again."
        )


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _resolve(host: str, port: int, deadline: float) -> _Addresses:
    found: list[_Addresses] = []

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.append([(family, address) for family, _, _, _, address in answers])

    thread = threading.Thread(target=ask, name="fedsea-resolve", daemon=True)  # the resolver takes no deadline
    thread.start()
    thread.join(_left(deadline))
    if not found or not found[0]:
        raise TransportError(
            f"The host name {host} cannot be resolved: check its spelling, this machine's network and its name server."
        )
    return found[0]


def _connect(addresses: _Addresses, address: str, deadline: float) -> socket.socket:
    refused, failure = False, ""
    for index, (family, target) in enumerate(addresses):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(_left(deadline) / (len(addresses) - index))
        try:
            sock.connect(target)
        except ConnectionRefusedError:
            refused = True
        except TimeoutError:
            failure = failure or "no answer"
        except OSError as error:
            failure = failure or error.strerror or type(error).__name__
        else:
            return sock
        sock.close()
    if refused:
        raise TransportError(
            f"Nothing listens at {address}: check the port, and start the server there with `fedsea server`."
        )
    raise TransportError(
        f"{address} cannot be reached ({failure}): check the address, and that no firewall stands between."
    )


def _examine_tls(plain: socket.socket, host: str, address: str, identity: Identity, deadline: float) -> FedseaError:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=identity.ca_pem.decode())
    context.load_cert_chain(identity.folder / CERTIFICATE_FILE, identity.folder / KEY_FILE)
    context.set_alpn_protocols(["h2"])
    plain.settimeout(_left(deadline))
    try:
        with context.wrap_socket(plain, server_hostname=host) as secure:
            secure.settimeout(_left(deadline))
            return _after_handshake(_first_byte(secure), secure.selected_alpn_protocol(), address, identity)
    except ssl.SSLCertVerificationError as error:
        return _bad_server_certificate(error, host, address, identity)
    except ssl.SSLError as error:
        return _no_handshake(error, address, identity)
    except TimeoutError:
        return TransportError(
            f"{address} accepts connections but does not answer as a fedsea server would: check that the port is the "
            "server's, and look at the server's log."
        )
    except (ConnectionResetError, BrokenPipeError):
        return _closed(address, identity)


def _first_byte(secure: ssl.SSLSocket) -> bytes:
    """What the server says first; nothing if it closes. With TLS 1.3 it refuses our certificate only here."""
    try:
        secure.sendall(_HTTP2_HELLO)
        return secure.recv(1)
    except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
        return b""


def _after_handshake(answer: bytes, protocol: str | None, address: str, identity: Identity) -> FedseaError:
    if protocol != "h2":
        return TransportError(
            f"{address} has a certificate of our authority but is not a fedsea server: check the port."
        )
    if not answer:  # gRPC sends no alert when it refuses a certificate; it just closes
        return _refused(address, identity)
    if through_relay(address):
        return TransportError(
            f"{address} answers, and accepts this client's certificate, but nothing came from the server behind it: "
            "ask the relay's operator whether it reaches the server, and try again."
        )
    return TransportError(
        f"{address} answers, and accepts this client's certificate: the server was busy or restarting, so try again; "
        "if it goes on, look at the server's log."
    )


def _closed(address: str, identity: Identity) -> FedseaError:
    return _expired(identity) or TransportError(
        f"{address} closes the connection at once: check that it is a fedsea server and not another program, and look "
        "at its log."
    )


def _bad_server_certificate(
    error: ssl.SSLCertVerificationError, host: str, address: str, identity: Identity
) -> FedseaError:
    code = error.verify_code
    if code == _EXPIRED:
        return AuthError(
            f"The certificate of the server {address} has expired: ask its operator to run `fedsea ca server`; if it "
            f"is new, check this machine's clock, which says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
        )
    if code == _NOT_YET_VALID:
        return AuthError(
            f"The certificate of the server {address} is not valid yet by this machine's clock, which says "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: set the clock."
        )
    if code in _OTHER_HOST and through_relay(address):
        return AuthError(
            f"What answers at {address} is no relay of this federation: leave out relay:// if it is the server, or "
            "ask the operator for the relay's address."
        )
    if code in _OTHER_HOST:
        return AuthError(
            f"The server's certificate is not for {host}: use the host name that the operator gave, or ask for "
            f"`fedsea ca server --host {host}`; if TLS ends at a relay there, write relay://{address}."
        )
    if code == _PURPOSE:
        return AuthError(
            f"{address} shows a certificate that is not a server's, so somebody may be posing as the server: tell the "
            "operator and do not connect."
        )
    return AuthError(
        f"The certificate of the server {address} is not of the authority that this client trusts "
        f"({identity.ca_fingerprint[:23]}…): check the address; if the operator made a new authority, enrol again."
    )


def _no_handshake(error: ssl.SSLError, address: str, identity: Identity) -> FedseaError:
    if "ALERT" in (error.reason or ""):
        return _refused(address, identity)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return _closed(address, identity)
    return TransportError(f"{address} does not speak TLS, so it is not a fedsea server: check the host and the port.")


def _refused(address: str, identity: Identity) -> FedseaError:
    return _expired(identity) or AuthError(
        f"The server {address} refuses this client's certificate: check that it is the server of the federation where "
        f"{identity.name} was approved and that this machine's clock is right; if its operator made a new authority, "
        "enrol again."
    )


def _expired(identity: Identity) -> FedseaError | None:
    if datetime.now(UTC) <= identity.not_after:
        return None
    return AuthError(
        f"The certificate of {identity.name} expired on {identity.not_after:%Y-%m-%d %H:%M} UTC: run `fedsea enroll "
        "--again` and send the request to the operator."
    )
