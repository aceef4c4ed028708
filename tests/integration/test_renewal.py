"""Certificates that are renewed while a federation runs."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest

from fedsea.client.renewal import IdentityKeeper
from fedsea.wire.identity import Authority, Identity, enroll, install
from tests.support.federation import Federation


def make_old_identities(folder, *, server_days_ago: float = 0, client_days_ago: float = 0) -> None:
    """Identities of 30 days that were issued some days ago."""
    authority = Authority.create(folder / "ca", "test federation")

    def ago(days: float) -> Authority:
        return Authority.open(folder / "ca", clock=lambda: datetime.now(UTC) - timedelta(days=days))

    ago(server_days_ago).issue_server(["127.0.0.1"], folder=folder / "server")
    certificate = ago(client_days_ago).approve(enroll(folder / "a", "a").csr_pem)
    install(folder / "a", certificate.pem, authority.ca_pem, authority.fingerprint)


@pytest.fixture
def aged(tmp_path, base_model):
    made: list[Federation] = []

    def make(**ages: float) -> Federation:
        make_old_identities(tmp_path / "ids", **ages)
        made.append(Federation(tmp_path / "fed", base_model, tmp_path / "ids", ("a",), {}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def serial(fed: Federation, who: str) -> str:
    return Identity.load(fed.identities / who).serial


def test_a_client_renews_its_old_certificate_while_it_trains(aged):
    fed = aged(client_days_ago=25)
    before = serial(fed, "a")
    fed.start_server()
    assert fed.start_client("a").finish().next_step == 6
    renewed = Identity.load(fed.identities / "a")
    assert renewed.serial != before
    assert renewed.not_after > datetime.now(UTC) + timedelta(days=29)


def test_a_young_certificate_is_left_alone(aged):
    fed = aged(client_days_ago=2)
    before = serial(fed, "a")
    fed.start_server()
    fed.start_client("a").finish()
    assert serial(fed, "a") == before


def test_a_refused_renewal_is_logged_and_the_old_certificate_serves_on(aged, caplog):
    fed = aged(client_days_ago=25)
    (fed.identities / "ca" / "ca.key.pem").rename(fed.folder / "ca.key.pem")
    fed.start_server()
    keeper = IdentityKeeper(fed.identities / "a", fed.address)
    before = keeper.current()
    keeper.renew()
    assert keeper.current() is before
    assert "could not be renewed" in caplog.text


def test_the_server_renews_its_own_old_certificate(aged, caplog):
    caplog.set_level(logging.INFO)
    fed = aged(server_days_ago=25)
    before = serial(fed, "server")
    server = fed.start_server()
    assert serial(fed, "server") != before
    assert "the server's certificate was renewed" in caplog.text
    assert fed.start_client("a").finish().next_step == 6
    server.finish()
