"""The handshake of a sealed stream: three messages, each at most a few kilobytes.

    client  offer   what the stream is for, a nonce, an ephemeral X25519 key, its certificate
    server  answer  a nonce, an ephemeral X25519 key, its certificate; signature over offer and answer
    client  proof   signature over offer, answer and the server's signature

Both signatures (ECDSA P-256, the certificates' keys) cover the role of their maker, both certificates, nonces and
ephemeral keys, and the version; the keys come by HKDF-SHA256 from the X25519 secret and the hash of all three messages.
So nobody in between can take a side's place, mix two handshakes, replay an old one, or choose an older version; and
certificates' keys that are stolen later open nothing that was recorded.
"""

from __future__ import annotations

import enum
import os
import struct
import time
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedsea.errors import AuthError, ProtocolError, TransportError
from fedsea.wire.identity import certificates as certs
from fedsea.wire.identity.certificates import Clock
from fedsea.wire.sealing.ends import SealingIdentity, check_server, read_certificate, signed
from fedsea.wire.sealing.keys import Monotonic, StreamKeys, derive

SEALING_VERSION = 1
HANDSHAKE_S = 15.0
"""A handshake that took longer is refused."""

_MAGIC = b"FSEL"
_HEAD = struct.Struct("<4sBB")
_KEYS = struct.Struct("<32s32s")
_SIZE = struct.Struct("<H")
_OFFER, _ANSWER, _PROOF = 1, 2, 3
_LONGEST = 16 << 10
_SERVER, _CLIENT = b"fedsea sealed stream: server\0", b"fedsea sealed stream: client\0"


class Subject(enum.IntEnum):
    """What a sealed stream is for."""

    SESSION = 1
    STATUS = 2
    RENEWAL = 3


class ClientHandshake:
    """The client's side.

    Args:
        me: Ours.
        subject: What the stream is for.
        clock: Gives the time, for the server's certificate.
        monotonic: Gives seconds.
    """

    def __init__(
        self,
        me: SealingIdentity,
        subject: Subject = Subject.SESSION,
        *,
        clock: Clock = certs.utc_now,
        monotonic: Monotonic = time.monotonic,
    ) -> None:
        self._me, self._clock, self._monotonic = me, clock, monotonic
        self._ephemeral = X25519PrivateKey.generate()
        body = bytes([subject]) + _own_keys(self._ephemeral) + _sized(me.certificate)
        self.offer = _HEAD.pack(_MAGIC, SEALING_VERSION, _OFFER) + body

    def finish(self, answer: bytes) -> tuple[bytes, StreamKeys]:
        """The proof to be sent, and the stream's keys.

        Raises:
            AuthError: It is not the federation's server that answered.
            ProtocolError: This is no answer.
        """
        reader = _Reader(answer, _ANSWER)
        ephemeral = reader.keys()
        certificate = read_certificate(reader.sized(), "The server's certificate")
        unsigned, signature = reader.taken(), reader.sized()
        reader.end()
        check_server(certificate, self._me.ca, self._clock)
        offered = sha256(self.offer).digest()
        if not signed(certificate, signature, _SERVER + offered + sha256(unsigned).digest()):
            raise AuthError(
                "The server's answer is not signed by the key of its certificate: somebody may be posing as the "
                "server; tell the operator."
            )
        answered = sha256(answer).digest()
        proof = _HEAD.pack(_MAGIC, SEALING_VERSION, _PROOF) + _sized(self._me.sign(_CLIENT + offered + answered))
        transcript = sha256(offered + answered + sha256(proof).digest()).digest()
        return proof, derive(_agree(self._ephemeral, ephemeral), transcript, "client", self._monotonic)


class ServerHandshake:
    """The server's side, for one stream. Whether the client may take part is the gate's business, afterwards.

    Args:
        me: Ours.
        monotonic: Gives seconds.

    Attributes:
        subject: What the client wants the stream for; after `answer`.
        certificate_pem: What the client showed; it is proven to be its own by `finish`.
    """

    def __init__(self, me: SealingIdentity, *, monotonic: Monotonic = time.monotonic) -> None:
        self.subject = Subject.SESSION
        self.certificate_pem = b""
        self._me, self._monotonic = me, monotonic
        self._begun = monotonic()
        self._ephemeral = X25519PrivateKey.generate()
        self._offered = self._answered = b""

    def answer(self, offer: bytes) -> bytes:
        """What to answer an offer.

        Raises:
            AuthError: The client's certificate is damaged.
            ProtocolError: This is no offer.
        """
        reader = _Reader(offer, _OFFER)
        try:
            self.subject = Subject(reader.take(1)[0])
        except ValueError:
            raise ProtocolError(f"A sealed stream is asked for something unknown here; {_UPGRADE}") from None
        self._theirs = reader.keys()
        self._certificate = read_certificate(reader.sized(), "The client's certificate")
        reader.end()
        self.certificate_pem = certs.certificate_to_pem(self._certificate)
        self._offered = sha256(offer).digest()
        unsigned = (
            _HEAD.pack(_MAGIC, SEALING_VERSION, _ANSWER) + _own_keys(self._ephemeral) + _sized(self._me.certificate)
        )
        signature = self._me.sign(_SERVER + self._offered + sha256(unsigned).digest())
        answer = unsigned + _sized(signature)
        self._answered = sha256(answer).digest()
        return answer

    def finish(self, proof: bytes) -> StreamKeys:
        """The stream's keys.

        Raises:
            AuthError: The client does not hold the key of the certificate that it showed.
            ProtocolError: This is no proof.
            TransportError: It came too late.
        """
        if self._monotonic() - self._begun > HANDSHAKE_S:
            raise TransportError(f"The handshake of a sealed stream took longer than {HANDSHAKE_S:g} s: connect again.")
        reader = _Reader(proof, _PROOF)
        signature = reader.sized()
        reader.end()
        if not signed(self._certificate, signature, _CLIENT + self._offered + self._answered):
            raise AuthError(
                "The client's proof is not made for this connection with the key of the certificate that it showed: "
                "check that key and certificate in its identity folder belong together, and connect again."
            )
        transcript = sha256(self._offered + self._answered + sha256(proof).digest()).digest()
        return derive(_agree(self._ephemeral, self._theirs), transcript, "server", self._monotonic)


_UPGRADE = "both sides need compatible versions of fedsea."


class _Reader:
    """One handshake message, taken apart; everything is bounded, and nothing may be left over."""

    def __init__(self, data: bytes, kind: int) -> None:
        if len(data) > _LONGEST or data[: len(_MAGIC)] != _MAGIC:
            raise ProtocolError(
                "This stream has to be sealed, and what came is no sealed handshake: see `relay://` and wire.sealed in "
                f"the documentation; {_UPGRADE}"
            )
        self._data, self._at = data, 0
        _, version, found = _HEAD.unpack(self.take(_HEAD.size))
        if version != SEALING_VERSION:
            raise ProtocolError(f"The peer seals by version {version}, here it is {SEALING_VERSION}; {_UPGRADE}")
        if found != kind:
            raise ProtocolError("The messages of a sealed handshake came out of order; connect again.")

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise ProtocolError("A message of a sealed handshake is cut short; connect again.")
        self._at += size
        return part

    def taken(self) -> bytes:
        return self._data[: self._at]

    def keys(self) -> bytes:
        """The ephemeral key; the nonce before it matters to the transcript only."""
        _, ephemeral = _KEYS.unpack(self.take(_KEYS.size))
        assert isinstance(ephemeral, bytes)
        return ephemeral

    def sized(self) -> bytes:
        (size,) = _SIZE.unpack(self.take(_SIZE.size))
        return self.take(size)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError("A message of a sealed handshake is too long; connect again.")


def _own_keys(ephemeral: X25519PrivateKey) -> bytes:
    return _KEYS.pack(os.urandom(32), ephemeral.public_key().public_bytes_raw())


def _sized(part: bytes) -> bytes:
    return _SIZE.pack(len(part)) + part


def _agree(ours: X25519PrivateKey, theirs: bytes) -> bytes:
    try:
        return ours.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:  # a point of small order, which makes a secret that everybody knows
        raise ProtocolError("The peer's key in a sealed handshake is no key; connect again.") from None
