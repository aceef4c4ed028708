"""Records of a sealed stream open as what they are, where they belong, and nowhere else."""

from __future__ import annotations

import asyncio

import pytest

from fedsea.errors import TransportError
from fedsea.wire.sealing import keys as sealing
from fedsea.wire.sealing.keys import MAX_AGE_S, TAG_BYTES, SealBroken, StreamKeys, derive
from fedsea.wire.sealing.pipe import SealedPipe

CHUNKS = [bytes([number]) * (100 + number) for number in range(12)]


def pair(transcript: bytes = b"t" * 32, clock=lambda: 0.0) -> tuple[StreamKeys, StreamKeys]:
    shared = b"s" * 32
    return derive(shared, transcript, "client", clock), derive(shared, transcript, "server", clock)


def records(keys: StreamKeys) -> list[bytes]:
    return [keys.sealer.seal(chunk) for chunk in CHUNKS]


def test_what_is_sealed_opens_at_the_other_end_in_both_directions():
    client, server = pair()
    for ours, theirs in ((client, server), (server, client)):
        sealed = records(ours)
        assert [len(record) - len(chunk) for record, chunk in zip(sealed, CHUNKS, strict=True)] == [TAG_BYTES] * 12
        assert [theirs.opener.open(record) for record in sealed] == CHUNKS


def test_the_same_bytes_sent_again_are_sealed_under_a_new_nonce():
    client, server = pair()
    first, again = client.sealer.seal(CHUNKS[0]), client.sealer.seal(CHUNKS[0])
    assert first != again
    assert server.opener.open(first) == server.opener.open(again) == CHUNKS[0]


@pytest.mark.parametrize("at", [0, 1, 50, 115, -16, -1])
def test_an_altered_record_does_not_open_and_nothing_after_it(at):
    client, server = pair()
    sealed = records(client)
    wrong = bytearray(sealed[0])
    wrong[at if at < len(wrong) else -1] ^= 1
    with pytest.raises(SealBroken, match="altered"):
        server.opener.open(bytes(wrong))
    with pytest.raises(SealBroken, match="altered"):
        server.opener.open(sealed[0])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 60])
def test_a_truncated_record_does_not_open(size):
    client, server = pair()
    with pytest.raises(SealBroken, match="altered"):
        server.opener.open(client.sealer.seal(CHUNKS[0])[:size])


def test_a_record_that_comes_twice_is_refused():
    client, server = pair()
    sealed = records(client)
    for record in sealed[:5]:
        server.opener.open(record)
    with pytest.raises(SealBroken, match="came twice"):
        server.opener.open(sealed[3])


@pytest.mark.parametrize("then", [6, 9])
def test_records_left_out_or_out_of_order_are_refused(then):
    client, server = pair()
    sealed = records(client)
    for record in sealed[:5]:
        server.opener.open(record)
    with pytest.raises(SealBroken, match="missing or came too late"):
        server.opener.open(sealed[then])


def test_a_record_of_the_other_direction_or_of_another_stream_is_refused():
    client, server = pair()
    with pytest.raises(SealBroken, match="does not belong"):
        client.opener.open(client.sealer.seal(CHUNKS[0]))
    other, _ = pair(b"u" * 32)
    with pytest.raises(SealBroken, match="does not belong"):
        server.opener.open(other.sealer.seal(CHUNKS[0]))


def test_an_end_that_the_peer_made_is_told_from_a_cut():
    class Silence:
        def __init__(self, *chunks: bytes) -> None:
            self.chunks = list(chunks)

        async def read(self) -> bytes | None:
            return self.chunks.pop(0) if self.chunks else None

        async def write(self, chunk: bytes) -> None:
            raise AssertionError

    client, server = pair()
    whole = Silence(client.sealer.seal(CHUNKS[0]), client.sealer.seal(b""))
    pipe = SealedPipe(whole, server)
    assert asyncio.run(pipe.read()) == CHUNKS[0]
    assert asyncio.run(pipe.read()) is None
    assert server.opener.ended

    client, server = pair()
    cut = SealedPipe(Silence(client.sealer.seal(CHUNKS[0])), server)
    assert asyncio.run(cut.read()) == CHUNKS[0]
    with pytest.raises(SealBroken, match="cut"):
        asyncio.run(cut.read())
    assert not server.opener.ended


def test_an_end_comes_after_what_was_being_sent_and_not_instead_of_it():
    class Slow:
        def __init__(self) -> None:
            self.began, self.goes_on = asyncio.Event(), asyncio.Event()
            self.records: asyncio.Queue[bytes] = asyncio.Queue()

        async def read(self) -> bytes:
            return await self.records.get()

        async def write(self, chunk: bytes) -> None:
            self.began.set()
            await self.goes_on.wait()
            await self.records.put(chunk)

    async def work() -> None:
        client, server = pair()
        slow = Slow()
        pipe = SealedPipe(slow, client)
        pipe.keep(alive_s=0.0, silence_s=10.0)
        await slow.began.wait()  # it says that it is alive
        ending = asyncio.create_task(pipe.end())
        await asyncio.wait({ending}, timeout=0.01)
        slow.goes_on.set()
        await ending
        assert await SealedPipe(slow, server).read() is None

    asyncio.run(work())


def test_nothing_opens_behind_the_end():
    client, server = pair()
    assert server.opener.open(client.sealer.seal(b"")) is None
    with pytest.raises(SealBroken, match="behind the end"):
        server.opener.open(client.sealer.seal(CHUNKS[0]))


def test_keys_move_forward_and_old_ones_are_gone(monkeypatch):
    monkeypatch.setattr(sealing, "RECORDS_PER_KEY", 4)
    client, server = pair()
    first_key, first_secret = server.opener._cipher, server.opener._secret
    sealed = records(client)
    assert [server.opener.open(record) for record in sealed] == CHUNKS
    assert server.opener._secret != first_secret
    # Whoever takes the present state opens the present record, and none of an earlier key's.
    assert server.opener._why(sealed[8]).startswith("A piece of a sealed stream was altered")
    late = client.sealer.seal(CHUNKS[0])
    with pytest.raises(sealing.InvalidTag):
        first_key.decrypt(client.sealer._nonce(12), late, client.sealer._authenticated(12))
    assert server.opener.open(late) == CHUNKS[0]


def test_keys_that_are_too_old_seal_and_open_nothing_and_reconnecting_helps():
    now = [0.0]
    client, server = pair(clock=lambda: now[0])
    record = client.sealer.seal(CHUNKS[0])
    now[0] = MAX_AGE_S
    for use in (lambda: client.sealer.seal(CHUNKS[0]), lambda: server.opener.open(record)):
        with pytest.raises(SealBroken, match="24 hours old: reconnect") as caught:
            use()
        assert isinstance(caught.value, TransportError)
        assert caught.value.retryable


def test_the_last_word_opens_for_this_streams_client_alone_and_is_sealed_once():
    client, server = pair()
    word = server.seal_last_word(b"revoked")
    assert b"revoked" not in word
    assert client.open_last_word(word) == b"revoked"
    assert pair(b"u" * 32)[0].open_last_word(word) is None
    assert client.open_last_word(word[:-1] + b"\0") is None or word[-1] == 0
    assert client.open_last_word(b"") is None
    with pytest.raises(AssertionError, match="once"):
        server.seal_last_word(b"again")
