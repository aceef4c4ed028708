"""Keys that two members share, and keystreams that are added to words.

Every stream key is made by HKDF from a secret of this attempt and bound to the attempt's roster, to the pair (or the
one member) and to the group: no two streams are ever the same. A stream is AES-256 in counter mode over zeros; never a
generator of numpy or torch, whose state an observer of some outputs can compute, and whose seeds are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsea.errors import ProtocolError
from fedsea.federation.secure.messages import KEY_BYTES, joined

_PIECE_WORDS = 1 << 15
"""Words of a piece: it stays in the processor's cache while all streams are added to it."""
_ONCE = bytes(12)
"""Nonce of a key that seals one message."""


def exchange(own: X25519PrivateKey, other: bytes) -> bytes:
    """The secret that two members share.

    Raises:
        ProtocolError: The other's key is none.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise ProtocolError("A member's key cannot be used: it is damaged, or chosen to be guessed.") from None


def derive(secret: bytes, digest: bytes, *purpose: bytes | str | int) -> bytes:
    """A key for one purpose of one attempt.

    Args:
        secret: Of this attempt.
        digest: `messages.roster_digest`.
        purpose: What the key is for.
    """
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=digest, info=joined("fedsea secure key 1", *purpose)).derive(secret)


def pair_stream_key(own: X25519PrivateKey, other: bytes, digest: bytes, names: tuple[str, str], group: int) -> bytes:
    """Key of the mask between two members for a group; `names` in either order."""
    return derive(exchange(own, other), digest, "pair", *sorted(names), group)


def self_stream_key(seed: bytes, digest: bytes, name: str, group: int) -> bytes:
    """Key of a member's own mask for a group."""
    return derive(seed, digest, "self", name, group)


def seal_shares(own: X25519PrivateKey, other: bytes, digest: bytes, way: tuple[str, str], plain: bytes) -> bytes:
    """Encrypt one member's shares for another; once for each way and attempt.

    Args:
        own: Sender's sharing key.
        other: Receiver's.
        digest: `messages.roster_digest`.
        way: Sender, receiver.
        plain: The shares.
    """
    key = derive(exchange(own, other), digest, "shares", *way)
    return AESGCM(key).encrypt(_ONCE, plain, joined(digest, *way))


def open_shares(own: X25519PrivateKey, other: bytes, digest: bytes, way: tuple[str, str], sealed: bytes) -> bytes:
    """The other end of `seal_shares`; `own` is the receiver's.

    Raises:
        ProtocolError: They were not sealed by that sender for this receiver in this attempt, or were altered.
    """
    key = derive(exchange(own, other), digest, "shares", *way)
    try:
        return AESGCM(key).decrypt(_ONCE, sealed, joined(digest, *way))
    except (InvalidTag, ValueError):
        raise ProtocolError(
            f"The shares of {way[0]} for {way[1]} do not open: they were altered, swapped, or are of another attempt. "
            "Nothing was masked; ask the server's operator, and that client's."
        ) from None


def add_streams(words: np.ndarray, adding: Sequence[bytes], subtracting: Sequence[bytes] = ()) -> None:
    """Add and subtract keystreams mod 2^64, in place.

    Args:
        words: uint64.
        adding: Keys of streams to add.
        subtracting: Keys of streams to subtract.
    """
    piece_bytes = 8 * min(_PIECE_WORDS, len(words))
    zeros, buffer = bytes(piece_bytes), bytearray(piece_bytes + 15)  # 15: room that the library asks for
    streams = [(_stream(key), False) for key in adding] + [(_stream(key), True) for key in subtracting]
    for start in range(0, len(words), _PIECE_WORDS):
        piece = words[start : start + _PIECE_WORDS]
        for stream, negative in streams:
            stream.update_into(memoryview(zeros)[: piece.nbytes], buffer)
            noise = np.frombuffer(buffer, dtype="<u8", count=len(piece))
            np.subtract(piece, noise, out=piece) if negative else np.add(piece, noise, out=piece)


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
