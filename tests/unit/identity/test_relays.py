"""A relay's identity: what it is good for, and that it is neither a client nor a server."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from fedsea.cli.main import app
from fedsea.errors import AuthError, ConfigError
from fedsea.wire.address import split_address, through_relay, tls_name
from fedsea.wire.identity import PeerGate, Role, certificates, enroll, install
from fedsea.wire.identity.peers import PeerRefused


def edge(office):
    certificate = office.approve("edge", role=Role.RELAY)
    return install(
        office.folder / "edge", certificate.pem, None, office.authority.fingerprint, clock=office.clock
    ), certificate


def test_a_relays_identity_says_what_it_is(office):
    identity, _ = edge(office)
    assert (identity.role, identity.name) == (Role.RELAY, "edge")
    certificate = certificates.certificate_from_pem(identity.certificate_pem, "it")
    assert certificates.relay_name(certificate) == "edge"
    with pytest.raises(AuthError, match="not a fedsea client's"):
        certificates.client_name(certificate)
    assert [(entry.name, entry.role) for entry in office.authority.entries()] == [("edge", Role.RELAY)]


def test_the_gate_keeps_clients_and_relays_apart(office):
    relay, _ = edge(office)
    client = office.approve("clinic")
    pem = certificates.certificate_to_pem(certificates.certificate_from_pem(client.pem, "it"))
    gate = PeerGate(office.folder / "ca", clock=office.clock, monotonic=office.clock.monotonic)
    assert gate.check_relay(relay.certificate_pem).role is Role.RELAY
    assert gate.check(pem).role is Role.CLIENT
    with pytest.raises(AuthError, match="takes no part itself"):
        gate.check(relay.certificate_pem)
    with pytest.raises(AuthError, match="not a relay's"):
        gate.check_relay(pem)


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_relay_that_is_revoked_or_has_expired_is_refused(office, how):
    relay, _ = edge(office)
    gate = PeerGate(office.folder / "ca", clock=office.clock, monotonic=office.clock.monotonic)
    if how == "revoked":
        assert len(office.authority.revoke("edge")) == 1
    office.clock.move(days=31 if how == "expired" else 1)
    with pytest.raises(PeerRefused, match=how):
        gate.check_relay(relay.certificate_pem)


def test_a_relay_need_not_be_on_the_list_of_clients(office):
    relay, _ = edge(office)
    gate = PeerGate(office.folder / "ca", ["clinic"], clock=office.clock, monotonic=office.clock.monotonic)
    assert gate.check_relay(relay.certificate_pem).name == "edge"


def test_a_name_has_one_role_only(office):
    edge(office)
    office.approve("clinic")
    with pytest.raises(ConfigError, match="name of a relay here"):
        office.authority.approve(enroll(office.folder / "other", "edge").csr_pem)
    with pytest.raises(ConfigError, match="name of a client here"):
        office.authority.approve(enroll(office.folder / "more", "clinic").csr_pem, role=Role.RELAY)
    with pytest.raises(ConfigError, match="made here"):
        office.authority.approve(enroll(office.folder / "again", "srv").csr_pem, role=Role.SERVER)


def test_a_relay_renews_nothing_by_itself(office):
    _, certificate = edge(office)
    office.clock.now += timedelta(days=25)
    with pytest.raises(AuthError, match="not a fedsea client's"):
        office.authority.renew(certificate.pem, enroll(office.folder / "edge", "edge", again=True).csr_pem)


@pytest.mark.parametrize("host", ["relay.fedsea.invalid", "RELAY.fedsea.invalid", "x.relay.fedsea.invalid"])
def test_no_server_may_have_the_relays_host_name(office, host):
    with pytest.raises(ConfigError, match="never of a server"):
        office.authority.issue_server([host])


def test_addresses_say_whether_there_is_a_relay():
    assert split_address("relay://edge.example.org:7443") == ("edge.example.org", 7443)
    assert split_address("relay://[::1]:7443") == split_address("[::1]:7443") == ("::1", 7443)
    assert through_relay("relay://edge:1")
    assert not through_relay("edge:1")
    assert tls_name("relay://edge:1") == "relay.fedsea.invalid"
    assert tls_name("edge:1") == "edge"
    for wrong in ("relay://", "relay://edge", "relay:edge:1:2", "https://edge:1"):
        with pytest.raises(ConfigError, match="relay:// before it"):
            split_address(wrong)


def test_the_operator_approves_a_relay_by_command(tmp_path, monkeypatch, restored):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def fedsea(*words):
        result = runner.invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    ca = json.loads(fedsea("ca", "init", "--host", "localhost", "--json"))
    fedsea("enroll", "--name", "edge")
    said = fedsea("ca", "approve", "identity/edge.request.pem", "--yes", "--role", "relay", "--days", "365")
    assert "approved as a relay" in said
    said = fedsea("enroll", "--install", "identity/edge.certificate.pem", "--ca-fingerprint", ca["ca_fingerprint"])
    assert said.startswith("This relay is edge")
    listed = json.loads(fedsea("ca", "list", "--json"))["certificates"]
    assert [entry["role"] for entry in listed] == ["server", "relay"]
    with pytest.raises(ConfigError, match="use client or relay"):
        runner.invoke(app, ["ca", "approve", "identity/edge.request.pem", "--role", "server"], catch_exceptions=False)
