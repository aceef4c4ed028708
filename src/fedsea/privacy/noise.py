"""Gaussian noise from a cryptographically secure generator, in float32, for CPU and GPU tensors.

A torch or numpy generator would not do: its seed has 32 bits, and who knows some of its values knows the others. Here
the random bits are an AES-256-CTR keystream under a key from the operating system, used once and never stored.
"""

from __future__ import annotations

import math
import os
import threading

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

_CHUNK = 1 << 16
"""Pairs of values that are made together: their temporaries stay in a core's cache."""

_GRAIN_BITS = 12
"""Noised values are multiples of the power of two that lies so many bits below the standard deviation."""

_TAIL = 1 << 20
"""Of 2^31 uniform numbers, those below are drawn with 31 more bits: neighbours' radii would lie further apart than the
grain, and whoever guesses a text could tell from a tail's radius that the guess is wrong."""


class GaussianNoise:
    """Adds independent normal noise. Any thread may call it.

    Values come in pairs from the Box-Muller transform of a uniform number and an angle of 32 random bits. The number
    has 31 bits, and 31 more where it is small; it is never 0, so logarithms are finite, and the tails reach
    sqrt(2 ln 2^63) = 9.35 standard deviations, beyond which lies 1e-20 of a normal.

    Args:
        key: 32 bytes for tests that need the same noise twice; otherwise the operating system's randomness.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._stream: CipherContext | None = None
        self._process = -1

    def add(self, values: torch.Tensor, std: float) -> torch.Tensor:
        """Values plus noise, as a new float32 tensor on the same device.

        The sums are rounded to multiples of the power of two that is 12 bits below `std`: the low bits of a floating-
        point sum depend on what was added to the noise, and would tell it (Mironov, CCS 2012).

        Args:
            values: Of any shape; not changed.
            std: Standard deviation, above 0.
        """
        grain = 2.0 ** (math.floor(math.log2(std)) - _GRAIN_BITS)
        # In units of the grain, whose powers of two round nothing.
        noised = self.standard_normal(values.numel(), values.device).view(values.shape).mul_(std / grain)
        return noised.add_(values.detach(), alpha=1.0 / grain).round_().mul_(grain)

    def standard_normal(self, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """`count` independent standard normal values, float32."""
        pairs = (count + 1) // 2
        values = torch.empty(2 * pairs, dtype=torch.float32, device=device)
        chunk = _CHUNK if values.device.type == "cpu" else max(pairs, 1)
        for start in range(0, pairs, chunk):
            stop = min(pairs, start + chunk)
            words = self._words(2 * (stop - start)).to(values.device)
            size = stop - start
            radius = self._uniform(words[:size]).log_().mul_(-2.0).sqrt_()
            angle = words[size:].to(torch.float32).mul_(math.pi * 2.0**-31)
            torch.cos(angle, out=values[2 * start : 2 * start + size]).mul_(radius)
            torch.sin(angle, out=values[2 * start + size : 2 * stop]).mul_(radius)
        return values[:count]

    def _uniform(self, words: torch.Tensor) -> torch.Tensor:
        """Numbers above 0 and at most 1 from 31 bits of each word; the small ones as finely spaced as they need it."""
        whole = words.bitwise_and_(0x7FFFFFFF)
        values = whole.to(torch.float32).add_(0.5)
        if (small := (whole < _TAIL).nonzero().view(-1)).numel():
            more = self._words(small.numel()).to(words.device).bitwise_and_(0x7FFFFFFF)
            values[small] = more.double().add_(0.5).mul_(2.0**-31).add_(whole[small]).float()
        return values.mul_(2.0**-31)

    def _words(self, count: int) -> torch.Tensor:
        """`count` random 32-bit words; no two calls share any, in this process or in one forked from it."""
        room = bytearray(4 * count + 15)
        with self._lock:
            if self._stream is None or self._process != os.getpid():
                self._stream, self._process = self._begin(), os.getpid()
            self._stream.update_into(bytes(4 * count), room)
        return torch.frombuffer(room, dtype=torch.int32, count=count)

    def _begin(self) -> CipherContext:
        key = os.urandom(32) if self._key is None else self._key
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
