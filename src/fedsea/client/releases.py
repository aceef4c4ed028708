"""What a training run releases, each thing once: a step or round that is done again sends the very same bytes.

Fresh noise on the same values would be a second release, and a second charge. Where the server's part in the values is
another one, they have to be released anew: a server that lies could have that as often as it likes, and average the
noise out. So there is an end to it, for the text of each step, and starting the client again does not begin it anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsea.client.trunk import Sealed, Trunk
from fedsea.errors import PrivacyError, StorageError
from fedsea.privacy.boundary import Boundary, Maskable
from fedsea.storage import write_bytes_atomic
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


class ReleaseNote:
    """How often the text of one update was released, where a process that is started again finds it.

    Args:
        path: Of the note; what is not there was never noted.

    Attributes:
        path: As given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, update: int) -> dict[str, int]:
        """Counts by what was released, as given to `write`; empty if the note is of another update.

        Raises:
            StorageError: The note is damaged.
        """
        try:
            note = json.loads(self.path.read_bytes())
            if note["update"] != update:
                return {}
            return {str(what): int(count) for what, count in note["released"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise StorageError(
                f"{self.path} is damaged, so it is not known how often the text of this step was sent with fresh "
                "noise: nothing more was. Restore the file, or take part with a new run folder."
            ) from None

    def write(self, update: int, released: Mapping[str, int]) -> None:
        """Durable when this returns."""
        write_bytes_atomic(self.path, json.dumps({"update": update, "released": dict(released)}).encode())


class Releases:
    """Of one step at a time, by micro-batch, and of its update.

    Everything raises a `PrivacyError` instead of the release that would be one too many, see `MOST_RELEASES`.

    Args:
        trunk: Seals them.
        boundary: The only maker of releases.
        note: Where counts outlive this process.
    """

    def __init__(self, trunk: Trunk, boundary: Boundary, note: ReleaseNote) -> None:
        self._trunk = trunk
        self._boundary = boundary
        self._note = note
        self._hidden: dict[int, Sealed] = {}
        self._gradients: dict[int, _Answered] = {}
        self._update: _Update | None = None
        self._number = -1
        self._released: Counter[str] = Counter()
        self._unnoted = 0  # releases of each thing that a process before this one may have made without a note
        self._notes_all = False

    def resume(self, update: int) -> None:
        """Go on in an update, of which a process before this one may have released everything once.

        Only what is released more than once is noted at once; so, after a start, is everything.

        Args:
            update: How many this client has taken part in.

        Raises:
            StorageError: The note is damaged.
        """
        self._number, self._released = update, Counter(self._note.read(update))
        self._unnoted, self._notes_all = 1, True

    def begin(self, update: int) -> None:
        """The text of an update comes next; of one that is begun again, the counts go on."""
        if update != self._number:
            self._number, self._released = update, Counter()
            self._unnoted, self._notes_all = 0, False

    def forget(self) -> None:
        """Another step begins, or the parameters are others: what follows are other values.

        How often a text was released stays, for a server can bring about either without going on.
        """
        self._hidden.clear()
        self._gradients.clear()

    def hidden(self, number: int, batch: TokenBatch, hidden_TH: torch.Tensor) -> Sealed:
        """Hidden states of a micro-batch."""
        if number not in self._hidden:
            self._count(Channel.HIDDEN, number)
            release = self._boundary.hidden(hidden_TH, batch.origin(Purpose.TRAINING))
            self._hidden[number] = self._trunk.seal(release)
        return self._hidden[number]

    def gradient(self, number: int, batch: TokenBatch, output_TH: torch.Tensor, gradient_TH: torch.Tensor) -> Sealed:
        """The gradient for an answer of the trunk's; for another answer it is another one, and a release of its own."""
        before = self._gradients.get(number)
        if before is not None and torch.equal(before.output, output_TH):
            return before.gradient
        self._count(Channel.GRADIENT, number)
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

    def _count_update(self, tensors: Tensors, reference: Tensors) -> None:
        if not _alike(tensors, {name: reference[name].to(own) for name, own in tensors.items() if name in reference}):
            self._count(Channel.UPDATE)  # else the server knows it: no text has gone into it since

    def _count(self, channel: Channel, number: int = 0) -> None:
        noise = self._boundary.noise
        if noise is None or not noise.std(channel):
            return
        what = f"{channel} {number}"
        count = max(self._released[what], self._unnoted) + 1
        if count > MOST_RELEASES:
            raise PrivacyError(
                f"The server has brought about {MOST_RELEASES} releases of one text on the {channel} channel, with "
                "fresh noise each: more of them would average it out, so no other is sent. Ask the operator why steps "
                "or rounds begin again with other values (restarts, other hardware, a training.wait that leaves this "
                "client behind), and only with an answer that you believe start this client again without "
                f"{self._note.path}."
            )
        self._released[what] = count
        if count > 1 or self._notes_all:
            self._note.write(self._number, self._released)


def _alike(one: Tensors, other: Tensors) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    )
