"""A secret of 32 bytes in shares, of which `threshold` give it back and fewer say nothing (Shamir, CACM 1979).

Polynomials over the smallest prime field above 2^256; share number x is the polynomial's value at x, from 1 on.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fedsea.errors import ProtocolError

PRIME = 2**256 + 297
SHARE_BYTES = 33
_SECRET_BYTES = 32


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares number 1 to `count` of a secret.

    Example:
        >>> shares = split(bytes(32), 2, 3)
        >>> combine({1: shares[0], 3: shares[2]}) == bytes(32)
        True
    """
    assert len(secret) == _SECRET_BYTES
    assert 1 <= threshold <= count
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind exactly as many shares as its threshold, by number; wrong shares give another secret.

    Raises:
        ProtocolError: A share is no share, or together they are of no secret.
    """
    values = {}
    for x, share in shares.items():
        values[x] = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or values[x] >= PRIME:
            raise ProtocolError("A share of a secret has a wrong size.")
    secret = sum(value * _at_zero(x, values) for x, value in values.items()) % PRIME
    if secret >= 2 ** (8 * _SECRET_BYTES):
        raise ProtocolError("The shares do not belong to one secret.")
    return secret.to_bytes(_SECRET_BYTES, "big")


def _at_zero(x: int, points: Mapping[int, int]) -> int:
    """Lagrange's basis polynomial of x, at 0."""
    above = below = 1
    for other in points:
        if other != x:
            above = above * other % PRIME
            below = below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
