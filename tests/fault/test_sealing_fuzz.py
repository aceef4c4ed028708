"""Whatever a relay makes of sealed records and handshakes: errors in our own words, never a message nobody sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.errors import FedseaError
from fedsea.wire import messages as m
from fedsea.wire.encoding import Decoder, Encoder
from fedsea.wire.sealing.ends import SealingIdentity
from fedsea.wire.sealing.handshake import ClientHandshake, ServerHandshake
from fedsea.wire.sealing.keys import SealBroken, derive
from fedsea.wire.sealing.pipe import SealedPipe
from fedsea.wire.stream import MessageStream
from tests.contract.loopback import Federation
from tests.fault import frames

MANY = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def sent(transcript: bytes = b"t" * 32) -> tuple[list[str], list[bytes]]:
    """Messages of a client, by kind, and their records; the orderly end is the last one."""
    keys, encoder = derive(b"s" * 32, transcript, "client", lambda: 0.0), Encoder("client", frames.codecs("fp32"))
    kinds, records = [], []
    for message in frames.client_messages():
        encoded = encoder.encode(message)
        kinds.append(encoded.kind)
        records += [keys.sealer.seal(chunk) for chunk in encoded.chunks]
    return kinds, [*records, keys.sealer.seal(b"")]


ACTS = ("flip", "cut", "grow", "drop", "twice", "swap", "move", "foreign", "bytes", "end")
KINDS, RECORDS = sent()
_, FOREIGN = sent(b"u" * 32)


class Recorded:
    """A transport that brings what it was given, and then ends."""

    def __init__(self, records: list[bytes]) -> None:
        self._records = list(records)

    async def read(self) -> bytes | None:
        return self._records.pop(0) if self._records else None

    async def write(self, chunk: bytes) -> None:
        raise AssertionError("nothing is sent here")


def received(records: list[bytes]) -> tuple[list[str], FedseaError | None]:
    """Kinds of the messages that came out of records, and what ended it; None is the orderly end."""

    async def work() -> tuple[list[str], FedseaError | None]:
        pipe = SealedPipe(Recorded(records), derive(b"s" * 32, b"t" * 32, "server", lambda: 0.0))
        stream = MessageStream(
            pipe.read,
            pipe.write,
            Encoder("server", {}),
            Decoder(frames.limits(), "server"),
            send_timeout_s=1.0,
            broken=lambda _: None,
        )
        kinds: list[str] = []
        try:
            async for message in stream:
                kinds.append(type(message).__name__)
        except FedseaError as error:
            return kinds, error
        finally:
            await stream.release()
        return kinds, None

    return asyncio.run(work())


def test_untouched_records_give_every_message_and_the_orderly_end() -> None:
    assert received(RECORDS) == (KINDS, None)
    assert {"Hello", "Forward", "RoundUpdate"} <= set(KINDS)


@st.composite
def meddled(draw: st.DrawFn) -> list[bytes]:
    """The records after one to four acts of a relay."""
    records = list(RECORDS)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(records) - 1, 0)))
        if not records:
            break
        match draw(
            st.sampled_from(("flip", "cut", "grow", "drop", "twice", "swap", "move", "foreign", "bytes", "end"))
        ):
            case "flip":
                data = bytearray(records[at])
                if data:
                    data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
                records[at] = bytes(data)
            case "cut":
                records[at] = records[at][: draw(st.integers(0, len(records[at])))]
            case "grow":
                records[at] += draw(st.binary(min_size=1, max_size=40))
            case "drop":
                del records[at]
            case "twice":
                records.insert(at, records[at])
            case "swap":
                other = draw(st.integers(0, len(records) - 1))
                records[at], records[other] = records[other], records[at]
            case "move":
                records.insert(draw(st.integers(0, len(records) - 1)), records.pop(at))
            case "foreign":
                records[at] = draw(st.sampled_from(FOREIGN))
            case "bytes":
                records.insert(at, draw(st.binary(max_size=300)))
            case "end":
                del records[at:]
    return records


@MANY
@given(records=meddled())
def test_meddled_records_give_a_beginning_of_what_was_sent_and_then_an_error(records: list[bytes]) -> None:
    kinds, error = received(records)
    assert kinds == KINDS[: len(kinds)]
    if records[: len(RECORDS)] == RECORDS:
        assert error is None  # what comes behind the end is not even read
    else:
        assert isinstance(error, SealBroken)


@MANY
@given(records=st.lists(st.binary(max_size=600), max_size=5))
def test_made_up_records_give_nothing(records: list[bytes]) -> None:
    kinds, error = received(records)
    assert kinds == []
    assert isinstance(error, SealBroken)


# --- the handshake ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> tuple[SealingIdentity, SealingIdentity]:
    folder: Path = tmp_path_factory.mktemp("party")
    federation = Federation(folder / "f", "clinic")
    return SealingIdentity.of(federation.clients["clinic"]), SealingIdentity.of(federation.server)


@st.composite
def mutation(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int, bytes]:
    """Which message, which of its bytes become what, how much is cut off, what is hung on."""
    flips = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4))
    return draw(st.integers(0, 2)), flips, draw(st.integers(0, 30)), draw(st.binary(max_size=20))


def mutate(message: bytes, flips: list[tuple[int, int]], cut: int, more: bytes) -> bytes:
    data = bytearray(message)
    for at, value in flips:
        if at < len(data):
            data[at] = value
    return bytes(data[: len(data) - cut]) + more


@MANY
@given(change=mutation())
def test_a_mutated_handshake_shares_no_keys(
    party: tuple[SealingIdentity, SealingIdentity], change: tuple[int, list[tuple[int, int]], int, bytes]
) -> None:
    which, *how = change
    client, server = ClientHandshake(party[0]), ServerHandshake(party[1])
    changed = False

    def through(number: int, message: bytes) -> bytes:
        nonlocal changed
        wrong = mutate(message, *how) if number == which else message  # type: ignore[arg-type]
        changed = changed or wrong != message
        return wrong

    try:
        proof, ours = client.finish(through(1, server.answer(through(0, client.offer))))
        theirs = server.finish(through(2, proof))
    except FedseaError:
        assert changed
        return
    sealed = ours.sealer.seal(b"secret")
    if changed:
        with pytest.raises(SealBroken):
            theirs.opener.open(sealed)
    else:
        assert theirs.opener.open(sealed) == b"secret"


@MANY
@given(junk=st.binary(max_size=400))
def test_made_up_handshakes_are_refused_in_our_own_words(
    party: tuple[SealingIdentity, SealingIdentity], junk: bytes
) -> None:
    server = ServerHandshake(party[1])
    heads = [b"", *(b"FSEL\x01" + bytes([kind]) for kind in range(5))]
    for head in heads:
        with pytest.raises(FedseaError):
            ServerHandshake(party[1]).answer(head + junk)
        with pytest.raises(FedseaError):
            ClientHandshake(party[0]).finish(head + junk)
    server.answer(ClientHandshake(party[0]).offer)
    for head in heads:
        with pytest.raises(FedseaError):
            server.finish(head + junk)


def test_what_is_fuzzed_is_what_is_sent() -> None:
    assert len(RECORDS) > len(KINDS)
    assert m.Hello.__name__ == KINDS[0]
