"""What a client needs of a trunk, wherever it runs.

`LocalTrunk` (this process) and `RemoteTrunk` (a server) both satisfy `Trunk`; one contract suite runs against
both. Nothing here assumes that the trunk's owner sees hidden states: values are sealed first, and only a trunk
knows what sealing means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from fedsea.errors import FedseaError
from fedsea.types import BlockRange, Release
from fedsea.wire import messages as m

Sealed: TypeAlias = Any
"""A release in the form in which its trunk takes it; kept for resending the very same values."""

Tensors = Mapping[str, torch.Tensor]


class StepInterrupted(Exception):  # noqa: N818 (a signal to the trainer, not an error of the user's)
    """The step under way will not be answered; the next event says where to go on."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The trunk is there (again) and knows where this client stands."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a client holds durably; the fields of `messages.Join`."""

    next_step: int = 0
    prepared_step: int = -1
    round: int = 0


Secure: TypeAlias = m.SecureRoster | m.SecureDelivery | m.SecureSurvivors | m.SecureEvidence
"""What a server asks in the course of secure aggregation."""

Event: TypeAlias = Connected | m.StepOpen | m.StepDone | m.RoundOpen | m.RoundResult | m.Finished | Secure


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Where a micro-batch belongs, and how it is packed."""

    step: int
    attempt: int
    number: int
    count: int
    lengths: tuple[int, ...]
    num_target_tokens: int
    blocks: BlockRange


class TrunkSession(Protocol):
    """Sequences that decode through a trunk which remembers their past."""

    version: int
    """Step of the run after which the trunk's adapters were as this session sees them; -1 before the first answer."""

    def extend(
        self, hidden: Sealed, positions: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> Future[torch.Tensor]:
        """Hidden states [T, H] of new tokens through the trunk.

        Args:
            hidden: Of all sequences, end to end.
            positions: Where each sequence's new tokens begin; whatever it held from there on is forgotten.
            lengths: New tokens of each sequence; 0 leaves it as it is.
            sources: For each sequence, the one whose past it takes over first; empty keeps its own.

        Returns:
            Hidden states [T, H], float32. The future raises a `FedseaError` if the session is over.
        """
        ...

    def close(self) -> None:
        """Give its memory back; may be called twice."""
        ...


class Trunk(Protocol):
    """The middle of the model, as a client uses it. Calls return at once; results come as futures and events."""

    def next_event(self) -> Event:
        """Wait for what to do next.

        Raises:
            FedseaError: The trunk is lost for good; the message says what to do.
        """
        ...

    def seal(self, release: Release) -> Sealed:
        """Take a release's tensors into the form that can be sent, and sent again."""
        ...

    def forward(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """Hidden states [T, H] through the trunk.

        Returns:
            Hidden states [T, H], float32. The future raises `StepInterrupted` when the step is given up.
        """
        ...

    def backward(self, where: MicroBatch, gradient: Sealed) -> Future[torch.Tensor | None]:
        """Gradient [T, H] of the summed loss back through the trunk.

        Returns:
            Gradient at the trunk's input, or None if the plan trains nothing below the cut.
        """
        ...

    def ready(self, step: int, attempt: int, num_target_tokens: int, squared_norm: float, gradients: Sealed) -> None:
        """This client's own gradients are durable; `StepDone` follows as an event."""
        ...

    def update(self, round_index: int, num_target_tokens: int, parameters: Sealed) -> None:
        """This client's trained parameters of a round; `RoundResult` follows as an event."""
        ...

    def tell(self, message: m.Message) -> None:
        """Send a part of secure aggregation; what follows comes as an event."""
        ...

    def evaluate(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """Like `forward`, without a gradient and outside any step."""
        ...

    def pull_back(self, where: MicroBatch, hidden: Sealed, gradient: Sealed) -> Future[torch.Tensor]:
        """Gradient [T, H] at the trunk's input, of what `evaluate` gave: its product with a gradient at the output.

        The trunk runs the hidden states again; its own parameters get no gradient.

        Args:
            where: As for `evaluate`.
            hidden: What was evaluated.
            gradient: Gradient at the trunk's output.
        """
        ...

    def open_session(self, max_tokens: int, num_sequences: int = 1) -> TrunkSession:
        """Set memory aside for sequences of at most so many tokens each; returns at once.

        Whether there is room shows in the first answer: a `CapacityError` of it means that trying again later may help.
        """
        ...

    def fetch(self) -> Future[m.TrunkState]:
        """The trunk's trained parameters by portable name, and after how many steps they are that."""
        ...

    def abandon(self, step: int, error: FedseaError) -> None:
        """Leave because of an error of this client's own; others are told its code, nothing else."""
        ...

    def close(self, next_step: int) -> None:
        """Leave for good."""
        ...
