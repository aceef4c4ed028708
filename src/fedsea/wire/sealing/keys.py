"""The keys of one sealed stream: a chain in each direction, and one key for the server's last word.

A record is a chunk under AES-256-GCM. Its number is its nonce and part of what is authenticated, and travels nowhere:
both sides count. So a record opens only as the n-th of its own stream in its own direction, and one that was altered,
left out, repeated, moved, turned round or put in from another stream does not open at all. An empty chunk ends a
direction in good order; a transport that ends without it was cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedsea.errors import TransportError

TAG_BYTES = 16
"""What sealing adds to a chunk."""

RECORDS_PER_KEY = 4096
"""Records after which a chain moves to its next key: at most 1 GB of full chunks."""

MAX_AGE_S = 24 * 3600.0
"""A stream is not used longer than this after its handshake; connecting again makes fresh keys."""

_KEY_BYTES = 32
_NEARBY = 16
"""Places around the expected one at which a record that does not open is tried, to say what happened to it."""

Monotonic = Callable[[], float]


class SealBroken(TransportError):  # noqa: N818 (what was found, on a stream that somebody else carries)
    """A sealed stream was tampered with, cut, or is too old. The stream is over; connecting again may help."""


class _Chain:
    """The keys of one direction, and how many records they have served.

    Args:
        secret: Of this direction of this stream alone.
        label: Of the direction; authenticated with every record.
        clock: Gives seconds.
    """

    def __init__(self, secret: bytes, label: bytes, clock: Monotonic) -> None:
        self.count = 0
        self._label = label
        self._clock = clock
        self._old_at = clock() + MAX_AGE_S
        self._secret = secret
        self._move_on()

    def _move_on(self) -> None:
        """Take the next key; neither it nor what comes after it leads back to the ones before."""
        block = HKDFExpand(hashes.SHA256(), 2 * _KEY_BYTES, b"fedsea sealed stream: next").derive(self._secret)
        self._secret, self._cipher = block[:_KEY_BYTES], AESGCM(block[_KEY_BYTES:])

    def _advance(self) -> None:
        self.count += 1
        if self.count % RECORDS_PER_KEY == 0:
            self._move_on()

    def _nonce(self, number: int) -> bytes:
        return number.to_bytes(12, "big")

    def _authenticated(self, number: int) -> bytes:
        return self._label + (number // RECORDS_PER_KEY).to_bytes(8, "big") + number.to_bytes(8, "big")

    def _check_age(self) -> None:
        if self._clock() >= self._old_at:
            raise SealBroken(
                f"The keys of this sealed stream are {MAX_AGE_S / 3600:g} hours old: reconnect, which makes new ones."
            )


class Sealer(_Chain):
    """Seals what this side sends."""

    def seal(self, chunk: bytes) -> bytes:
        """The next record; an empty chunk ends the direction.

        Raises:
            SealBroken: The keys are too old.
        """
        self._check_age()
        record = self._cipher.encrypt(self._nonce(self.count), chunk, self._authenticated(self.count))
        self._advance()
        return record


class Opener(_Chain):
    """Opens what the peer sends.

    Attributes:
        ended: The peer has ended its direction in good order.
    """

    def __init__(self, secret: bytes, label: bytes, clock: Monotonic) -> None:
        super().__init__(secret, label, clock)
        self.ended = False
        self._broken: str | None = None

    def open(self, record: bytes) -> bytes | None:
        """The chunk in the next record, or None if it is the orderly end.

        Raises:
            SealBroken: It is not the next record of this stream. From then on nothing is opened any more.
        """
        self._check_age()
        if self._broken is None and self.ended:
            self._broken = "Something came behind the end of a sealed stream; reconnect."
        if self._broken is None:
            try:
                chunk = self._cipher.decrypt(self._nonce(self.count), record, self._authenticated(self.count))
            except InvalidTag:
                self._broken = self._why(record)
            else:
                self._advance()
                self.ended = not chunk
                return chunk or None
        raise SealBroken(self._broken)

    def _why(self, record: bytes) -> str:
        """What became of a record, as far as the present key can tell."""
        first = self.count - self.count % RECORDS_PER_KEY
        for number in range(max(first, self.count - _NEARBY), min(first + RECORDS_PER_KEY, self.count + _NEARBY + 1)):
            try:
                self._cipher.decrypt(self._nonce(number), record, self._authenticated(number))
            except InvalidTag:
                continue
            what = "came twice" if number < self.count else "is missing or came too late"
            return f"A piece of a sealed stream {what}: whatever carries the connection is at fault; reconnect."
        return (
            "A piece of a sealed stream was altered, or does not belong to this stream: whatever carries the "
            "connection is at fault; reconnect."
        )


class StreamKeys:
    """Everything that one side holds of one sealed stream.

    Args:
        sealer: Of what it sends.
        opener: Of what it receives.
        last_word: Key for the one sentence with which the server may end the stream.
    """

    def __init__(self, sealer: Sealer, opener: Opener, last_word: bytes) -> None:
        self.sealer = sealer
        self.opener = opener
        self._last_word: bytes | None = last_word

    def seal_last_word(self, text: bytes) -> bytes:
        """Server: seal why the stream ends; once, for the key serves once."""
        key, self._last_word = self._last_word, None
        assert key is not None, "the last word is sealed once"
        return AESGCM(key).encrypt(bytes(12), text, b"fedsea sealed stream: last word")

    def open_last_word(self, sealed: bytes) -> bytes | None:
        """Client: why the server ended the stream; None if these are not its words."""
        if self._last_word is None:
            return None
        try:
            return AESGCM(self._last_word).decrypt(bytes(12), sealed, b"fedsea sealed stream: last word")
        except InvalidTag:
            return None


_FROM = {"client": b"C", "server": b"S"}


def derive(shared: bytes, transcript: bytes, side: str, clock: Monotonic = time.monotonic) -> StreamKeys:
    """The keys of a stream.

    Args:
        shared: What both sides' ephemeral keys agree on.
        transcript: Hash of everything that was said in the handshake.
        side: "client" or "server".
        clock: Gives seconds, for the keys' age.
    """

    def secret(what: bytes) -> bytes:
        info = b"fedsea sealed stream: " + what
        return HKDF(hashes.SHA256(), _KEY_BYTES, salt=transcript, info=info).derive(shared)

    peer = "server" if side == "client" else "client"
    sealer = Sealer(secret(b"from " + _FROM[side]), _FROM[side], clock)
    opener = Opener(secret(b"from " + _FROM[peer]), _FROM[peer], clock)
    return StreamKeys(sealer, opener, secret(b"last word"))
