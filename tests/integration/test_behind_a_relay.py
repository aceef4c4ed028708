"""A whole federation behind a relay where TLS ends: the same bits as without, whatever the relay does."""

from __future__ import annotations

import pytest
import torch

from fedsea.client import results
from fedsea.client.inference import open_decoder
from fedsea.errors import ProtocolError
from fedsea.wire.channel import ClientStream
from fedsea.wire.identity import Authority
from fedsea.wire.sealing import keys
from fedsea.wire.session import PeerSession
from tests.support.federation import assert_same_bits
from tests.support.relay import Cut, honest, make_relay, relay_thread

SETTINGS = {"training": {"micro_batches": 2, "rounds": 2, "steps_per_round": 4}}
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def edge(tmp_path, identities):
    return make_relay(tmp_path / "edge", Authority.open(identities / "ca"))


@pytest.fixture
def said(monkeypatch):
    """Every chunk that either side says, before it is sealed."""
    chunks: list[bytes] = []
    for kind in (ClientStream, PeerSession):
        original = kind._write

        async def write(self, chunk, original=original):
            chunks.append(bytes(chunk))
            await original(self, chunk)

        monkeypatch.setattr(kind, "_write", write)
    return chunks


def train(fed, *, through=None):
    parts = [fed.start_client(name, server=through or fed.address) for name in fed.names]
    for part in (*parts, fed.server):
        part.finish()


def test_a_federation_behind_a_relay_trains_to_the_same_bits_and_the_relay_reads_nothing(
    federation, edge, said, monkeypatch
):
    monkeypatch.setattr(keys, "RECORDS_PER_KEY", 5)  # so that keys change under way
    plain = federation("a", "b", **SETTINGS)
    plain.start_server()
    train(plain)
    said.clear()

    fed = federation("a", "b", **SETTINGS)
    fed.start_server()
    with relay_thread(edge, fed.address) as relay:
        train(fed, through=relay.address)
    assert_same_bits(fed, plain)

    assert len(relay.seen) > sum(map(len, said)) > 50_000
    assert any(b'"rounds":2' in chunk for chunk in said)
    pieces = {chunk[at : at + 24] for chunk in said for at in range(0, len(chunk) - 24, 997)}
    seen = relay.seen
    assert len(pieces) > 100
    assert not [piece for piece in pieces if piece in seen]
    assert b'"rounds"' not in seen
    assert str(fed.plan.model.path).encode() not in seen


def test_a_relay_that_meddles_costs_time_and_no_bit(federation, edge):
    plain = federation("a", "b", **SETTINGS)
    plain.start_server()
    train(plain)

    fed = federation("a", "b", **SETTINGS)
    fed.start_server()
    with relay_thread(edge, fed.address) as relay:
        left = [(up, act) for act in ("alter", "twice", "cut") for up in (True, False)]
        broken = []

        def meddle(call, up, number, chunk):
            # A stream for each act, and late enough that a step is under way.
            if not left or up is not left[0][0] or number < 6 or call in broken:
                return [chunk]
            _, act = left.pop(0)
            broken.append(call)
            if act == "cut":
                raise Cut
            return [chunk, chunk] if act == "twice" else [chunk[:-1] + bytes([chunk[-1] ^ 1])]

        relay.meddle = meddle
        train(fed, through=relay.address)
    assert not left
    assert len(relay.carried) >= 4 + len(broken) == 10  # an invitation and a stream a client, and one more for each
    assert_same_bits(fed, plain)


def test_a_sealed_plan_trains_to_the_same_bits_over_direct_connections(federation):
    plain, sealed = (federation("a", "b", **SETTINGS, wire={"sealed": on}) for on in (False, True))
    for fed in (plain, sealed):
        fed.start_server()
        train(fed)
    ours, theirs = sealed.parameters(), plain.parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_model_is_used_and_the_server_asked_through_a_relay(federation, edge):
    fed = federation("a")
    fed.start_server(exit_when_finished=False)

    def logits(address):
        options = fed.client_options("a", server=address, data=())
        with open_decoder(options, base=True) as opened, opened.decoder.open(8) as sequences:
            return sequences.extend([PROMPT])[0]

    with relay_thread(edge, fed.address) as relay:
        assert relay.meddle is honest
        assert torch.equal(logits(relay.address), logits(fed.address))
        assert results.status(relay.address, fed.identities / "a")["federation"] == "test"
        assert b'"federation"' not in relay.seen


def test_a_client_takes_no_part_unsealed_in_a_plan_that_says_sealed(federation, monkeypatch):
    fed = federation("a", wire={"sealed": True})
    fed.start_server()
    monkeypatch.setattr(ClientStream, "sealed", property(lambda _: False))
    with pytest.raises(ProtocolError, match="it did not seal this stream"):
        fed.start_client("a").finish()
