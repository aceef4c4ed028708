"""What a training run releases, each thing once: a step or round that is done again sends the very same bytes.

Fresh noise on the same values would be a second release, and a second charge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedsea.client.trunk import Sealed, Trunk
from fedsea.privacy.boundary import Boundary, Maskable
from fedsea.types import Purpose, TokenBatch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Answered:
    """What the trunk answered, and the gradient as released for that answer."""

    output: torch.Tensor
    gradient: Sealed


@dataclass(frozen=True, slots=True)
class _Update:
    """What was released for a round, or a step, and for which values."""

    key: tuple[str, int]
    tensors: Tensors
    sealed: Sealed


class Releases:
    """Of one step at a time, by micro-batch, and of its update.

    Args:
        trunk: Seals them.
        boundary: The only maker of releases.
    """

    def __init__(self, trunk: Trunk, boundary: Boundary) -> None:
        self._trunk = trunk
        self._boundary = boundary
        self._hidden: dict[int, Sealed] = {}
        self._gradients: dict[int, _Answered] = {}
        self._update: _Update | None = None

    def forget(self) -> None:
        """Another step begins, or the parameters are others: what follows are other values."""
        self._hidden.clear()
        self._gradients.clear()

    def hidden(self, number: int, batch: TokenBatch, hidden_TH: torch.Tensor) -> Sealed:
        """Hidden states of a micro-batch."""
        if number not in self._hidden:
            release = self._boundary.hidden(hidden_TH, batch.origin(Purpose.TRAINING))
            self._hidden[number] = self._trunk.seal(release)
        return self._hidden[number]

    def gradient(self, number: int, batch: TokenBatch, output_TH: torch.Tensor, gradient_TH: torch.Tensor) -> Sealed:
        """The gradient for an answer of the trunk's; for another answer it is another one, and a release of its own."""
        before = self._gradients.get(number)
        if before is not None and torch.equal(before.output, output_TH):
            return before.gradient
        sealed = self._trunk.seal(self._boundary.gradient(gradient_TH, batch.origin(Purpose.TRAINING)))
        if self._boundary.noise is not None:
            self._gradients[number] = _Answered(output_TH, sealed)
        return sealed

    def update(self, key: tuple[str, int], tensors: Tensors, reference: Tensors) -> Sealed:
        """An update; asked for again, it is the same bytes, unless its values are others by now.

        Args:
            key: What it is for.
            tensors: By name.
            reference: What the server knows of them already.
        """
        before = self._update
        if before is None or before.key != key or not _alike(before.tensors, tensors):
            sealed = self._trunk.seal(self._boundary.update(tensors, reference))
            before = self._update = _Update(key, tensors, sealed)
        return before.sealed

    def maskable(self, tensors: Tensors, reference: Tensors) -> Maskable:
        """An update for secure aggregation, which is kept by whoever masks it."""
        return self._boundary.maskable(tensors, reference)


def _alike(one: Tensors, other: Tensors) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    )
