"""Bookkeeping of one optimizer step: who has sent what, and what can run next.

A plain object without clocks, threads or connections; the coordinator asks it and acts. A *slot* is the
micro-batches of the same number of all members: they run through the trunk as one batch. Slots are propagated
back in order, so that gradients are summed in the same order in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fedsea.errors import ProtocolError
from fedsea.wire.messages import Backward, Forward, Pullback, StepReady


def only_tensor(message: Forward | Backward | Pullback) -> torch.Tensor:
    """The one tensor of a decoded message."""
    return _single(message, message.tensors)


def gradient_of(message: Pullback) -> torch.Tensor:
    """The gradient of a decoded message."""
    return _single(message, message.gradient)


def _single(message: object, tensors: object) -> torch.Tensor:
    if not isinstance(tensors, dict) or set(tensors) != {""}:
        raise ProtocolError(f"A {type(message).__name__} message must hold exactly one unnamed tensor.")
    tensor: torch.Tensor = tensors[""]
    return tensor


@dataclass(slots=True)
class MemberStep:
    """What one client has contributed to the step."""

    num_micro_batches: int
    forwards: dict[int, Forward] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[int, Backward] = field(default_factory=dict)
    propagated: dict[int, torch.Tensor | None] = field(default_factory=dict)
    ready: StepReady | None = None

    @property
    def all_propagated(self) -> bool:
        """Whether the trunk has done everything for this client."""
        return len(self.propagated) == self.num_micro_batches

    @property
    def num_target_tokens(self) -> int:
        """Target tokens whose gradients are in the trunk."""
        return sum(self.forwards[slot].num_target_tokens for slot in self.propagated)


class StepState:
    """One attempt at one step.

    Args:
        members: Client to its number of micro-batches, in the plan's order.
        silent: Members that send no gradients (only their output side is trained).
    """

    def __init__(self, step: int, attempt: int, members: dict[str, int], silent: Iterable[str] = ()) -> None:
        self.step = step
        self.attempt = attempt
        self.members = {name: MemberStep(count) for name, count in members.items()}
        self.silent = frozenset(silent)
        self.told: set[str] = set()  # members that were told to begin and, as far as is known here, have not begun
        self.dropped: dict[str, MemberStep] = {}
        self.unheard: set[str] = set()  # dropped, and nothing came from them since
        self.forwarded: set[int] = set()
        self.next_backward = 0
        self.running: set[tuple[str, int]] = set()
        self.finishing = False

    @property
    def num_slots(self) -> int:
        """Slots of the step; a client with fewer micro-batches is absent from the last ones."""
        everyone = [*self.members.values(), *self.dropped.values()]
        return max((member.num_micro_batches for member in everyone), default=0)

    def add_member(self, name: str, num_micro_batches: int, order: Sequence[str]) -> None:
        """Let a late client in; sums keep the plan's order."""
        self.members[name] = MemberStep(num_micro_batches)
        self.members = {client: self.members[client] for client in order if client in self.members}

    def has_sent_all(self, name: str) -> bool:
        """Whether the trunk has everything of this client that the step needs."""
        member = self.members[name]
        received = member.outputs if name in self.silent else member.gradients
        return len(received) == member.num_micro_batches

    def in_slot(self, slot: int) -> list[str]:
        """Members that have a micro-batch in `slot`, in the plan's order."""
        return [name for name, member in self.members.items() if slot < member.num_micro_batches]

    def add_forward(self, name: str, message: Forward) -> bool:
        """Record hidden states.

        Returns:
            False if this very micro-batch had been sent before with the same values.

        Raises:
            ProtocolError: The micro-batch's number is out of range.
            ChangedInput: It had been sent before with other values.
        """
        member = self.members[name]
        if message.num_micro_batches != member.num_micro_batches:
            raise ProtocolError(
                f"Client {name} announced {message.num_micro_batches} micro-batches in step {self.step}, but the plan "
                f"gives it {member.num_micro_batches}."
            )
        if not 0 <= message.micro_batch < member.num_micro_batches:
            raise ProtocolError(f"Client {name} sent micro-batch {message.micro_batch}, which the plan does not have.")
        hidden, before = only_tensor(message), member.forwards.get(message.micro_batch)
        if before is None:
            member.forwards[message.micro_batch] = message
            return True
        same = before.lengths == message.lengths and before.blocks == message.blocks
        if not same or not torch.equal(only_tensor(before), hidden):
            raise ChangedInput
        return False

    def add_backward(self, name: str, message: Backward) -> bool:
        """Record a gradient; like `add_forward`.

        Raises:
            ProtocolError: Its forward pass has not been answered, or the shapes differ.
            ChangedInput: It had been sent before with other values.
        """
        member = self.members[name]
        output = member.outputs.get(message.micro_batch)
        if output is None or name in self.silent:
            raise ProtocolError(
                f"Client {name} sent a gradient for micro-batch {message.micro_batch} of step {self.step}, for which "
                "the server has sent no output."
            )
        gradient = only_tensor(message)
        if gradient.shape != output.shape:
            raise ProtocolError(
                f"Client {name} sent a gradient of shape {tuple(gradient.shape)} for an output of shape "
                f"{tuple(output.shape)}."
            )
        before = member.gradients.get(message.micro_batch)
        if before is None:
            member.gradients[message.micro_batch] = message
            return True
        if not torch.equal(only_tensor(before), gradient):
            raise ChangedInput
        return False

    def ready_to_forward(self) -> int | None:
        """A slot whose members' hidden states are all here and that has not run, or None."""
        for slot in range(self.num_slots):
            names = self.in_slot(slot)
            if slot in self.forwarded or not names:
                continue
            if all(slot in self.members[name].forwards for name in names):
                return slot
        return None

    def ready_to_backward(self) -> int | None:
        """The next slot in order if all its members' gradients are here, or None."""
        slot = self.next_backward
        if slot >= self.num_slots or slot not in self.forwarded or ("forward", slot) in self.running:
            return None
        if all(slot in self.members[name].gradients for name in self.in_slot(slot) if name not in self.silent):
            return slot
        return None

    def complete(self) -> bool:
        """Whether the optimizer step may be applied."""
        if self.running or self.finishing or not self.members:
            return False
        return all(member.all_propagated and member.ready for member in self.members.values())

    def waiting_for(self) -> tuple[str, ...]:
        """Members whose turn it is to send something that the step needs next."""
        return tuple(name for name in self.members if self._has_turn(name))

    def _has_turn(self, name: str) -> bool:
        member = self.members[name]
        if member.ready is not None:
            return False
        slots = range(member.num_micro_batches)
        unanswered = next((slot for slot in slots if slot not in member.outputs), None)
        if unanswered is not None and unanswered not in member.forwards:
            return True
        if name in self.silent:
            return unanswered is None
        slot = self.next_backward
        return member.all_propagated or (slot in member.outputs and slot not in member.gradients)

    def drop(self, name: str) -> None:
        """Go on without a member; what the trunk has of it already stays and counts."""
        self.dropped[name] = self.members.pop(name)
        self.unheard.add(name)

    @property
    def num_target_tokens(self) -> int:
        """Target tokens whose gradients are in the trunk, of all clients."""
        everyone = [*self.members.values(), *self.dropped.values()]
        return sum(member.num_target_tokens for member in everyone)


class ChangedInput(Exception):  # noqa: N818 (a signal to the coordinator, not an error of the user's)
    """A repeated message holds other values than the first time: the attempt must begin again."""
