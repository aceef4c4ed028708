"""What members and server tell each other, and what is signed of it. Plain data; `wire` has its own form of it.

Whatever is signed or hashed is written with the length of every part before it, so that no two meanings share bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

KEY_BYTES = 32
"""Of X25519 keys, seeds, commitments and stream keys."""


class Verifier(Protocol):
    """Knows whose certificate is whose, by the federation's authority."""

    def name(self, certificate: bytes) -> str:
        """The client that a certificate (DER) names.

        Raises:
            AuthError: It is not a client's of this federation's authority, or not valid now.
        """
        ...

    def verify(self, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether the key of the certificate signed the statement."""
        ...


class Notary(Verifier, Protocol):
    """A `Verifier` that also holds one client's own key."""

    @property
    def certificate(self) -> bytes:
        """The client's certificate, DER."""
        ...

    def sign(self, statement: bytes) -> bytes:
        """A signature by the key of `certificate`."""
        ...


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A member's keys of one attempt, signed with its certificate's key.

    Attributes:
        name: The client.
        certificate: DER.
        sharing_key: X25519 key for the secrecy of shares on their way.
        mask_key: X25519 key of the pairwise masks.
        commitment: SHA-256 of the self mask's seed: a wrong share of it is noticed.
        signature: Over `advertised`.
    """

    name: str
    certificate: bytes
    sharing_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes


def joined(*parts: bytes | str | int) -> bytes:
    """Parts one after the other, each with its length before it."""
    encoded = []
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        encoded += [len(data).to_bytes(8, "little"), data]
    return b"".join(encoded)


def advertised(place: bytes, ad: Advertisement) -> bytes:
    """What a member signs of its keys.

    Args:
        place: `Setting.place`.
        ad: Its signature does not matter.
    """
    return joined("fedsea secure keys 1", place, ad.name, ad.certificate, ad.sharing_key, ad.mask_key, ad.commitment)


def roster_digest(place: bytes, roster: Sequence[Advertisement]) -> bytes:
    """Hash of everything that an attempt rests on; every key and signature is bound to it."""
    return hashlib.sha256(joined("fedsea secure roster 1", *(advertised(place, ad) for ad in roster))).digest()


def agreed_survivors(digest: bytes, sharers: Collection[str], survivors: Collection[str]) -> bytes:
    """What a member signs before it reveals anything: who shared, and whose masked values are in the sum."""
    return joined("fedsea secure survivors 1", digest, joined(*sorted(sharers)), joined(*sorted(survivors)))


def commitment_to(seed: bytes, place: bytes, name: str) -> bytes:
    """Binds a member to the seed of its self mask without telling it."""
    return hashlib.sha256(joined("fedsea secure seed 1", place, name, seed)).digest()
