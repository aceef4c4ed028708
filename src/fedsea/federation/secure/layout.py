"""Which parameters are summed over which clients, and what an attempt's members agree on before it begins.

Clients with different partitions hold different parameters. Parameters that exactly the same clients hold form a
group: a vector of its own with a weight of its own, masked between its holders only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from fedsea.errors import AggregationError, ProtocolError
from fedsea.federation.secure.fixed_point import FixedPoint
from fedsea.federation.secure.messages import joined
from fedsea.plan import FederationPlan

Words = dict[int, np.ndarray]
"""Group to uint64 words: its values one after the other, and the weight as the last."""

WEIGHTS = "weights"
"""Name of the tensor that carries a client's masked weights, one word a group; no parameter is called so."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that the same clients hold.

    Attributes:
        holders: In the plan's order.
        shapes: Parameter to shape, sorted by name.
    """

    holders: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_values(self) -> int:
        """Values of all its parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def slices(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        """Where each parameter lies in the group's vector."""
        start = 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            yield name, shape, slice(start, stop)
            start = stop


@dataclass(frozen=True, slots=True)
class Layout:
    """All groups of a plan, in an order that everybody finds by itself."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:
        """From every client's trained parameters.

        Args:
            shapes: Client (in the plan's order) to parameter to shape.
        """
        holders: dict[str, list[str]] = {}
        shape_of: dict[str, tuple[int, ...]] = {}
        for client, held in shapes.items():
            for name, shape in held.items():
                holders.setdefault(name, []).append(client)
                shape_of[name] = tuple(shape)
        groups: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
        for name in sorted(holders):
            groups.setdefault(tuple(holders[name]), {})[name] = shape_of[name]
        return cls(tuple(Group(who, held) for who, held in sorted(groups.items())))

    def of_client(self, name: str) -> tuple[int, ...]:
        """Groups that a client holds."""
        return tuple(index for index, group in enumerate(self.groups) if name in group.holders)

    def too_small(self, members: Collection[str], least: int) -> Group | None:
        """A group that some of these hold, but fewer than `least`: their sum must not be revealed."""
        for group in self.groups:
            if 0 < len(set(group.holders).intersection(members)) < least:
                return group
        return None

    def to_tensors(self, words: Words) -> dict[str, torch.Tensor]:
        """A client's words as int64 tensors by parameter name, and its weights as one more."""
        tensors: dict[str, torch.Tensor] = {}
        for index, vector in words.items():
            whole = torch.from_numpy(vector.view(np.int64))
            tensors |= {n: whole[part].view(shape) for n, shape, part in self.groups[index].slices()}
        weights = np.array([vector[-1] for vector in words.values()], dtype=np.uint64)
        return tensors | {WEIGHTS: torch.from_numpy(weights.view(np.int64))}

    def shapes_of(self, name: str) -> dict[str, tuple[int, ...]]:
        """Exactly the tensors that `to_tensors` makes for a client."""
        own = self.of_client(name)
        shapes = {n: shape for index in own for n, shape in self.groups[index].shapes.items()}
        return shapes | {WEIGHTS: (len(own),)}

    def zeros_of(self, index: int) -> np.ndarray:
        """Words of a group: its values, and the weight."""
        return np.zeros(self.groups[index].num_values + 1, dtype=np.uint64)

    def zeros(self) -> Words:
        """A sum over nobody."""
        return {index: self.zeros_of(index) for index in range(len(self.groups))}

    def check(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse masked tensors that are not exactly what a client holds.

        Raises:
            ProtocolError: One is missing, too many, or of another shape.
        """
        expected = self.shapes_of(name)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != expected or any(tensor.dtype is not torch.int64 for tensor in tensors.values()):
            raise ProtocolError(f"Client {name} must send all of its {len(expected)} masked tensors at once.")

    def add(self, total: Words, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add what a client sent to a sum, in place.

        Raises:
            ProtocolError: As for `check`; nothing was added.
        """
        self.check(name, tensors)
        weights = _words(tensors[WEIGHTS])
        for position, index in enumerate(self.of_client(name)):
            vector = total[index]
            for key, _, part in self.groups[index].slices():
                vector[part] += _words(tensors[key])
            vector[-1:] += weights[position : position + 1]


def _words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).numpy().view(np.uint64)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the members of an attempt agree on before it begins; both sides make it from the plan.

    Attributes:
        run_id: Identity of the run.
        plan_sha256: Hash of the plan.
        round: The round.
        attempt: Of the round, as the server counts; keys are fresh in each, whatever the count says.
        clients: Who may be a member, in the plan's order.
        threshold: Members that must remain to the end; so many shares give a secret back.
        least: Fewest summands of any sum that is revealed.
        layout: The groups.
        numbers: The fixed-point form.
    """

    run_id: str
    plan_sha256: str
    round: int
    attempt: int
    clients: tuple[str, ...]
    threshold: int
    least: int
    layout: Layout = field(repr=False)
    numbers: FixedPoint

    @classmethod
    def of(cls, plan: FederationPlan, run_id: str, round_index: int, attempt: int, layout: Layout) -> Self:
        """The setting of a plan."""
        return cls(
            run_id,
            plan.sha256(),
            round_index,
            attempt,
            plan.client_names,
            plan.secure_threshold,
            plan.aggregation.secure_min,
            layout,
            FixedPoint.of(len(plan.clients), plan.most_round_tokens),
        )

    @property
    def place(self) -> bytes:
        """Run, plan, round and attempt, as everything that is signed begins."""
        return joined(self.run_id, self.plan_sha256, self.round, self.attempt, self.threshold, self.least)

    def check_count(self, members: Collection[str]) -> None:
        """Refuse to go on with too few.

        Raises:
            AggregationError: Fewer than the threshold.
        """
        if len(members) < self.threshold:
            away = ", ".join(name for name in self.clients if name not in members)
            raise AggregationError(
                f"Secure aggregation of round {self.round} needs {self.threshold} of {len(self.clients)} clients, and "
                f"{len(members)} are left (not there: {away}). Nothing was revealed and everybody's state is kept: "
                "bring the missing clients back."
            )

    def check_groups(self, members: Collection[str]) -> None:
        """Refuse a sum over too few.

        Raises:
            AggregationError: A parameter is held by some of these members, but by fewer than `least`.
        """
        if (group := self.layout.too_small(members, self.least)) is not None:
            raise AggregationError(
                f"Of the clients that are left in round {self.round}, fewer than {self.least} hold "
                f"{next(iter(group.shapes))}: their sum would show too much (aggregation.secure_min). Nothing was "
                "revealed and everybody's state is kept: bring the missing clients back, or give clients the same cut."
            )

    def check_enough(self, members: Collection[str]) -> None:
        """Both `check_count` and `check_groups`, for those whose values are to be summed."""
        self.check_count(members)
        self.check_groups(members)
