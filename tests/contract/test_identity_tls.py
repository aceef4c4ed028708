"""Certificates in real TLS handshakes, of OpenSSL and of gRPC, and what `diagnose` says about those that fail."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from fedsea.errors import AuthError, ConfigError, TransportError
from fedsea.wire.identity import Authority, Identity, PeerGate, diagnose, enroll, install

LIMIT_S = 10.0


def days_ago(days: float) -> Callable[[], datetime]:
    moment = datetime.now(UTC) - timedelta(days=days)
    return lambda: moment


@dataclass
class World:
    """Two authorities with everything that can be right or wrong between a client and a server."""

    folder: Path

    def __post_init__(self) -> None:
        self.ours = Authority.create(self.folder / "ca", "ours", clock=days_ago(100))
        self.theirs = Authority.create(self.folder / "other-ca", "theirs", clock=days_ago(100))

    def client(self, name: str, authority: str = "ca", age_days: float = 0) -> Identity:
        clock = days_ago(age_days)
        office = Authority.open(self.folder / authority, clock=clock)
        folder = self.folder / f"{authority}-{name}"
        certificate = office.approve(enroll(folder, name).csr_pem)
        return install(folder, certificate.pem, None, office.fingerprint, clock=clock)

    def server(self, host: str = "localhost", authority: str = "ca", age_days: float = 0) -> Identity:
        clock = days_ago(age_days)
        office = Authority.open(self.folder / authority, clock=clock)
        folder = self.folder / f"{authority}-server-{host}-{age_days}"
        return Identity.load(office.issue_server([host], folder=folder), clock=clock)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def good(world) -> Identity:
    return world.client("clinic")


@contextlib.contextmanager
def grpc_server(identity: Identity, trusts: bytes | None = None) -> Iterator[tuple[str, list[bytes]]]:
    """A gRPC server of one method; gives its address, and the list of the certificates that its peers showed."""
    shown: list[bytes] = []

    def hello(request: bytes, context: grpc.ServicerContext) -> bytes:
        shown.extend(context.auth_context()["x509_pem_cert"])
        return request

    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.method_handlers_generic_handler("test", {"hello": grpc.unary_unary_rpc_method_handler(hello)})
    server.add_generic_rpc_handlers((handler,))
    credentials = grpc.ssl_server_credentials(
        [(identity.key_pem, identity.certificate_pem)], trusts or identity.ca_pem, require_client_auth=True
    )
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        yield f"localhost:{port}", shown
    finally:
        server.stop(0).wait()


def grpc_call(address: str, ca_pem: bytes, key_pem: bytes | None, certificate_pem: bytes | None) -> bytes:
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca_pem, key_pem, certificate_pem)) as channel:
        return channel.unary_unary("/test/hello")(b"hello", timeout=LIMIT_S)


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A socket that handles one connection after the other in a thread."""
    listener = socket.create_server(("localhost", 0))

    def work() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(LIMIT_S)
                answer(connection)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield f"localhost:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(LIMIT_S)


def openssl_context(identity: Identity, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.load_verify_locations(cadata=identity.ca_pem.decode())
    context.load_cert_chain(identity.folder / "certificate.pem", identity.folder / "key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def openssl_handshake(client: Identity, server: Identity) -> None:
    """One OpenSSL handshake and one byte; raises what the client met, or else the server."""
    errors: list[Exception] = []

    def answer(connection: socket.socket) -> None:
        try:
            with openssl_context(server, ssl.PROTOCOL_TLS_SERVER).wrap_socket(connection, server_side=True) as secure:
                secure.sendall(b"!")
        except OSError as error:
            errors.append(error)

    with listening(answer) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), LIMIT_S) as plain:
            context = openssl_context(client, ssl.PROTOCOL_TLS_CLIENT)
            with context.wrap_socket(plain, server_hostname=host) as secure:
                if secure.recv(1) != b"!":
                    raise ssl.SSLError("no answer")
    if errors:
        raise errors[0]


def test_openssl_accepts_client_and_server_of_one_authority(world, good):
    openssl_handshake(good, world.server())


@pytest.mark.parametrize(
    ("client", "server"),
    [
        ({"name": "foreign", "authority": "other-ca"}, {}),
        ({"name": "old", "age_days": 60}, {}),
        ({}, {"authority": "other-ca"}),
        ({}, {"age_days": 60}),
        ({}, {"host": "elsewhere.example"}),
    ],
    ids=["foreign client", "expired client", "foreign server", "expired server", "server for another host"],
)
def test_openssl_refuses(world, good, client, server):
    with pytest.raises(ssl.SSLError):
        openssl_handshake(world.client(**client) if client else good, world.server(**server))


def test_openssl_refuses_a_clients_certificate_as_a_servers(world, good):
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        openssl_handshake(good, world.client("posing"))


def test_openssl_refuses_a_servers_certificate_as_a_clients(world):
    with pytest.raises(ssl.SSLError):
        openssl_handshake(world.server(), world.server())


def test_grpc_hands_the_gate_the_certificate_of_the_client(world, good):
    with grpc_server(world.server()) as (address, shown):
        assert grpc_call(address, good.ca_pem, good.key_pem, good.certificate_pem) == b"hello"
    assert PeerGate(world.folder / "ca").check(shown[0]).name == "clinic"


def test_grpc_lets_a_revoked_client_through_and_the_gate_does_not(world):
    client = world.client("leaver")
    world.ours.revoke("leaver")
    with grpc_server(world.server()) as (address, shown):
        grpc_call(address, client.ca_pem, client.key_pem, client.certificate_pem)
    with pytest.raises(AuthError, match="revoked"):
        PeerGate(world.folder / "ca").check(shown[0])


def test_grpc_refuses_a_client_without_a_certificate(world, good):
    with grpc_server(world.server()) as (address, shown), pytest.raises(grpc.RpcError):
        grpc_call(address, good.ca_pem, None, None)
    assert shown == []


@pytest.mark.parametrize(
    "options",
    [{"name": "foreign2", "authority": "other-ca"}, {"name": "old2", "age_days": 60}],
    ids=["foreign", "expired"],
)
def test_grpc_refuses_a_client_that_is(world, good, options):
    client = world.client(**options)
    with grpc_server(world.server()) as (address, shown), pytest.raises(grpc.RpcError):
        grpc_call(address, good.ca_pem, client.key_pem, client.certificate_pem)
    assert shown == []


def test_grpc_refuses_a_servers_certificate_as_a_clients(world):
    server = world.server()
    with grpc_server(server) as (address, shown), pytest.raises(grpc.RpcError):
        grpc_call(address, server.ca_pem, server.key_pem, server.certificate_pem)
    assert shown == []


@pytest.mark.parametrize(
    "server",
    [{"authority": "other-ca"}, {"age_days": 60}, {"host": "elsewhere.example"}],
    ids=["foreign", "expired", "for another host"],
)
def test_a_grpc_client_refuses_a_server_that_is(world, good, server):
    with grpc_server(world.server(**server), trusts=good.ca_pem) as (address, shown), pytest.raises(grpc.RpcError):
        grpc_call(address, good.ca_pem, good.key_pem, good.certificate_pem)
    assert shown == []


def test_a_grpc_client_refuses_a_clients_certificate_as_a_servers(world, good):
    with grpc_server(world.client("posing2")) as (address, shown), pytest.raises(grpc.RpcError):
        grpc_call(address, good.ca_pem, good.key_pem, good.certificate_pem)
    assert shown == []


def found(address: str, identity: Identity, kind: type, *, timeout_s: float = LIMIT_S) -> str:
    error = diagnose(address, identity, timeout_s)
    assert type(error) is kind, repr(error)
    return str(error)


def test_diagnose_a_server_that_is_well(world, good):
    with grpc_server(world.server()) as (address, _):
        assert "try again" in found(address, good, TransportError)


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        ({"authority": "other-ca"}, "not of the authority that this client trusts"),
        ({"age_days": 60}, "certificate of the server .* has expired"),
        ({"age_days": -20}, "set the clock"),
        ({"host": "elsewhere.example"}, "not for localhost"),
    ],
    ids=["foreign", "expired", "of the future", "for another host"],
)
def test_diagnose_a_server_whose_certificate_is(world, good, server, sentence):
    with grpc_server(world.server(**server), trusts=good.ca_pem) as (address, _):
        assert re.search(sentence, found(address, good, AuthError))


def test_diagnose_a_client_posing_as_a_server(world, good):
    with grpc_server(world.client("posing3")) as (address, _):
        assert "posing as the server" in found(address, good, AuthError)


def test_diagnose_our_own_expired_certificate(world):
    client = world.client("old3", age_days=60)
    with grpc_server(world.server()) as (address, _):
        assert "fedsea enroll --again" in found(address, client, AuthError)


def test_diagnose_a_server_that_does_not_accept_our_authority(world, good):
    with grpc_server(world.server(), trusts=world.theirs.ca_pem) as (address, _):
        assert "refuses this client's certificate" in found(address, good, AuthError)


def test_diagnose_an_openssl_server_that_refuses_our_certificate(world, good):
    server, context = world.server(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.folder / "certificate.pem", server.folder / "key.pem")
    context.load_verify_locations(cadata=world.theirs.ca_pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with listening(answer) as address:
        assert "refuses this client's certificate" in found(address, good, AuthError)


def test_diagnose_a_server_that_stops_at_this_moment(world, good):
    """It closes one connection after the handshake, as on a refusal; then it is gone."""
    server, connections = world.server(), []
    context = openssl_context(server, ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        connections.append(connection)
        if len(connections) == 1:
            context.wrap_socket(connection, server_side=True).close()

    with listening(answer) as address:
        assert "closes the connection" in found(address, good, TransportError)


def test_diagnose_a_program_that_speaks_first_and_not_tls(good):
    with listening(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as address:
        assert "does not speak TLS" in found(address, good, TransportError)


def test_diagnose_a_web_server_without_tls(good):
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening(answer) as address:
        assert "does not speak TLS" in found(address, good, TransportError)


def test_diagnose_a_program_that_says_nothing(good):
    with listening(lambda connection: connection.recv(1 << 16) and connection.recv(1)) as address:
        assert "does not answer" in found(address, good, TransportError, timeout_s=0.5)


def test_diagnose_a_program_that_hangs_up(good):
    with listening(lambda connection: None) as address:
        assert "closes the connection" in found(address, good, TransportError)


def test_diagnose_another_tls_program_with_our_certificate(world, good):
    server = world.server()

    def answer(connection: socket.socket) -> None:
        with openssl_context(server, ssl.PROTOCOL_TLS_SERVER).wrap_socket(connection, server_side=True) as secure:
            secure.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening(answer) as address:
        assert "not a fedsea server" in found(address, good, TransportError)


def test_diagnose_a_closed_port(good):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert "Nothing listens" in found(address, good, TransportError)


def test_diagnose_a_name_that_does_not_resolve(good, monkeypatch):
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "cannot be resolved" in found("fedsea.exmaple.org:7443", good, TransportError)


@pytest.mark.parametrize("error", [TimeoutError(), OSError(errno.EHOSTUNREACH, "No route to host")])
def test_diagnose_an_address_that_nothing_answers_from(good, monkeypatch, error):
    def unreachable(*args: object) -> None:
        raise error

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert "firewall" in found("127.0.0.1:7443", good, TransportError)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":7443", "localhost:x", "::1:7443", "localhost:70000"])
def test_diagnose_what_is_no_address(good, address):
    assert address in found(address, good, ConfigError)
