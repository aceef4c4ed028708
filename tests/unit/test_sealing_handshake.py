"""The sealed handshake: two ends that know each other share keys, and nobody else's doing leads to any."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedsea.errors import AuthError, FedseaError, ProtocolError, TransportError
from fedsea.wire.identity.certificates import new_key
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import HANDSHAKE_S, ClientHandshake, ServerHandshake, Subject
from fedsea.wire.sealing.keys import SealBroken, StreamKeys
from tests.contract.loopback import Federation
from tests.support.relay import make_relay


class Party:
    """Two federations, so that there is a foreign one."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Federation(folder / "ours", "clinic", "bank"), Federation(folder / "theirs", "clinic")
        self.client = SealingIdentity.of(self.ours.clients["clinic"])
        self.bank = SealingIdentity.of(self.ours.clients["bank"])
        self.server = SealingIdentity.of(self.ours.server)
        self.foreign_server = SealingIdentity.of(self.theirs.server)
        self.relay = SealingIdentity.of(make_relay(folder / "edge", self.ours.authority))


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Party:
    return Party(tmp_path_factory.mktemp("party"))


def shake(client: ClientHandshake, server: ServerHandshake) -> tuple[StreamKeys, StreamKeys]:
    proof, ours = client.finish(server.answer(client.offer))
    return ours, server.finish(proof)


def test_both_ends_share_keys_and_know_each_other(party: Party) -> None:
    server = ServerHandshake(party.server)
    ours, theirs = shake(ClientHandshake(party.client, Subject.RENEWAL), server)
    assert theirs.opener.open(ours.sealer.seal(b"up")) == b"up"
    assert ours.opener.open(theirs.sealer.seal(b"down")) == b"down"
    assert server.subject is Subject.RENEWAL
    assert server.certificate_pem == party.ours.clients["clinic"].certificate_pem


def test_every_handshake_makes_other_keys(party: Party) -> None:
    first, second = (shake(ClientHandshake(party.client), ServerHandshake(party.server)) for _ in range(2))
    with pytest.raises(SealBroken):
        second[1].opener.open(first[0].sealer.seal(b"of the first"))


@pytest.mark.parametrize("who", ["foreign_server", "relay", "bank"])
def test_a_client_refuses_whoever_is_not_its_authoritys_server(party: Party, who: str) -> None:
    client = ClientHandshake(party.client)
    with pytest.raises(AuthError, match=r"posing as it|not of the authority"):
        client.finish(ServerHandshake(getattr(party, who)).answer(client.offer))


def test_a_client_refuses_a_server_without_the_certificates_key(party: Party) -> None:
    client = ClientHandshake(party.client)
    imposter = replace(party.server, key=new_key())
    with pytest.raises(AuthError, match="not signed by the key of its certificate"):
        client.finish(ServerHandshake(imposter).answer(client.offer))


@pytest.mark.parametrize(("days", "words"), [(40, "expired"), (-2, "not valid yet")])
def test_a_client_refuses_a_servers_certificate_out_of_its_time(party: Party, days: int, words: str) -> None:
    client = ClientHandshake(party.client, clock=lambda: datetime.now(UTC) + timedelta(days=days))
    with pytest.raises(AuthError, match=words):
        client.finish(ServerHandshake(party.server).answer(client.offer))


def test_a_server_refuses_a_client_whose_key_is_not_the_certificates(party: Party) -> None:
    """As after a certificate was replaced, and the old key or the old certificate is still in use."""
    stale = replace(party.client, key=new_key())
    with pytest.raises(AuthError, match="key of the certificate"):
        shake(ClientHandshake(stale), ServerHandshake(party.server))


def test_a_recorded_handshake_is_of_no_use(party: Party) -> None:
    client, server = ClientHandshake(party.client), ServerHandshake(party.server)
    proof, _ = client.finish(server.answer(client.offer))
    server.finish(proof)
    again = ServerHandshake(party.server)
    again.answer(client.offer)
    with pytest.raises(AuthError, match="not made for this connection"):
        again.finish(proof)


def test_a_server_cannot_be_used_to_answer_for_another_client(party: Party) -> None:
    """The answer to one client's offer does not serve another's."""
    clinic, bank = ClientHandshake(party.client), ClientHandshake(party.bank)
    answer = ServerHandshake(party.server).answer(clinic.offer)
    with pytest.raises(AuthError, match="not signed"):
        bank.finish(answer)


def test_a_handshake_older_than_its_bound_is_refused(party: Party) -> None:
    now = [0.0]
    client, server = ClientHandshake(party.client), ServerHandshake(party.server, monotonic=lambda: now[0])
    proof, _ = client.finish(server.answer(client.offer))
    now[0] = HANDSHAKE_S + 1
    with pytest.raises(TransportError, match="took longer"):
        server.finish(proof)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_makes_a_secret_everybody_knows_is_refused(party: Party, point: bytes) -> None:
    client, server = ClientHandshake(party.client), ServerHandshake(party.server)
    at = 4 + 2 + 1 + 32
    client.offer = client.offer[:at] + point + client.offer[at + 32 :]
    proof, _ = client.finish(server.answer(client.offer))
    with pytest.raises(ProtocolError, match="no key"):
        server.finish(proof)


def test_another_version_is_refused_and_cannot_be_slipped_in(party: Party) -> None:
    client = ClientHandshake(party.client)
    with pytest.raises(ProtocolError, match="seals by version 2"):
        ServerHandshake(party.server).answer(client.offer[:4] + b"\x02" + client.offer[5:])


def test_an_offer_does_not_answer_itself_and_a_frame_is_no_offer(party: Party) -> None:
    client = ClientHandshake(party.client)
    with pytest.raises(ProtocolError, match="out of order"):
        client.finish(client.offer)
    with pytest.raises(ProtocolError, match="has to be sealed"):
        ServerHandshake(party.server).answer(b"FSEA" + bytes(40))


@pytest.mark.parametrize("which", ["offer", "answer", "proof"])
def test_no_altered_byte_of_a_handshake_leads_to_shared_keys(party: Party, which: str) -> None:
    """Every byte once: either a side refuses, or what one seals the other cannot open."""
    client, server = ClientHandshake(party.client), ServerHandshake(party.server)
    size = len({"offer": client.offer, "answer": server.answer(client.offer), "proof": bytes(80)}[which])
    step = 1 if size < 100 else 5
    for at in range(0, size, step):
        client, server = ClientHandshake(party.client), ServerHandshake(party.server)

        altered: list[int] = []  # a signature has 70 to 72 bytes, so that some messages end before `at`

        def through(kind: str, message: bytes, at: int = at, altered: list[int] = altered) -> bytes:
            if kind != which or at >= len(message):
                return message
            altered.append(at)
            return message[:at] + bytes([message[at] ^ 0x11]) + message[at + 1 :]

        try:
            answer = through("answer", server.answer(through("offer", client.offer)))
            proof, ours = client.finish(answer)
            theirs = server.finish(through("proof", proof))
        except FedseaError:
            continue
        if altered:
            with pytest.raises(SealBroken):
                theirs.opener.open(ours.sealer.seal(b"secret"))
