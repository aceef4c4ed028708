"""What a training run releases, each thing once: a step or round that is done again sends the very same bytes.

Fresh noise on the same values would be a second release, and a second charge. Where the server's part in the values is
another one, they have to be released anew: a server that lies could have that as often as it likes, and average the
noise out. So there is an end to it, for the text of each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedsea.client.trunk import Sealed, Trunk
from fedsea.errors import PrivacyError
from fedsea.privacy.boundary import Boundary, Maskable
from fedsea.types import Channel, Purpose, TokenBatch

Tensors = Mapping[str, torch.Tensor]

MOST_RELEASES = 8
"""Of one micro-batch on a channel, and updates between two of them; averaged, the noise is more than a third of itself.

Honest ones are one and, for each time that a step begins anew with another trunk (on other hardware, in other company
in a batch, or at a later step because this client was left behind), one more.
"""


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


class _Text:
    """A micro-batch, and how often it was released with noise, by channel."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        self.released: Counter[Channel] = Counter()


class Releases:
    """Of one step at a time, by micro-batch, and of its update.

    Everything raises a `PrivacyError` instead of the release that would be one too many, see `MOST_RELEASES`.

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
        self._texts: dict[int, _Text] = {}
        self._updates: Counter[Channel] = Counter()

    def forget(self) -> None:
        """Another step begins, or the parameters are others: what follows are other values.

        How often a text was released stays, for a server can bring about either without going on.
        """
        self._hidden.clear()
        self._gradients.clear()

    def hidden(self, number: int, batch: TokenBatch, hidden_TH: torch.Tensor) -> Sealed:
        """Hidden states of a micro-batch."""
        if number not in self._hidden:
            self._count(self._text(number, batch).released, Channel.HIDDEN)
            release = self._boundary.hidden(hidden_TH, batch.origin(Purpose.TRAINING))
            self._hidden[number] = self._trunk.seal(release)
        return self._hidden[number]

    def gradient(self, number: int, batch: TokenBatch, output_TH: torch.Tensor, gradient_TH: torch.Tensor) -> Sealed:
        """The gradient for an answer of the trunk's; for another answer it is another one, and a release of its own."""
        before = self._gradients.get(number)
        if before is not None and torch.equal(before.output, output_TH):
            return before.gradient
        self._count(self._text(number, batch).released, Channel.GRADIENT)
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
            self._count_update(tensors, reference)
            sealed = self._trunk.seal(self._boundary.update(tensors, reference))
            before = self._update = _Update(key, tensors, sealed)
        return before.sealed

    def maskable(self, tensors: Tensors, reference: Tensors) -> Maskable:
        """An update for secure aggregation, which is kept by whoever masks it."""
        self._count_update(tensors, reference)
        return self._boundary.maskable(tensors, reference)

    def _text(self, number: int, batch: TokenBatch) -> _Text:
        """A micro-batch; a first one that was not there before begins a step of its own, with updates of its own."""
        text = self._texts.get(number)
        if text is None or text.batch is not batch:
            text = self._texts[number] = _Text(batch)
            if number == 0:
                self._updates.clear()
        return text

    def _count_update(self, tensors: Tensors, reference: Tensors) -> None:
        if not _alike(tensors, {name: reference[name].to(own) for name, own in tensors.items() if name in reference}):
            self._count(self._updates, Channel.UPDATE)  # else the server knows it: no text has gone into it since

    def _count(self, released: Counter[Channel], channel: Channel) -> None:
        noise = self._boundary.noise
        if noise is None or not noise.std(channel):
            return
        if released[channel] >= MOST_RELEASES:
            raise PrivacyError(
                f"The server has brought about {MOST_RELEASES} releases of one text on the {channel} channel, with "
                "fresh noise each: more of them would average it out, so no other is sent. Ask the operator why steps "
                "or rounds begin again with other values (restarts, other hardware, a training.wait that leaves this "
                "client behind), and start this client again only with an answer that you believe."
            )
        released[channel] += 1


def _alike(one: Tensors, other: Tensors) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    )
