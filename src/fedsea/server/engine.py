"""The trunk's arithmetic at the server: passes, the optimizer step, aggregation.

Every method runs on the engine thread, one at a time, and knows nothing of connections.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedsea.errors import NonFiniteError
from fedsea.federation.aggregation import Contribution, aggregate, mean, sum_gradients
from fedsea.model import adapters
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.model.passes import Entry, TrunkPasses, check_gradient
from fedsea.model.segments import Trunk
from fedsea.plan import FederationPlan
from fedsea.plan.robust import LEAST

Tensors = Mapping[str, torch.Tensor]
Pass = tuple[int, Entry, torch.Tensor]
"""Slot, what entered the trunk, and the gradient that came back for it."""

_MUCH_LARGER = 1e3

log = logging.getLogger(__name__)


class TrunkOverflow(NonFiniteError):  # noqa: N818 (a signal to whoever knows the clients' shares)
    """The trunk's own gradient is not finite, and it is not known yet whose share made it so."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of an optimizer step.

    Attributes:
        gradients: With `sync = "step"`, the summed gradients by name; else empty.
    """

    step: int
    num_target_tokens: int
    clip_coefficient: float
    gradients: Tensors = field(default_factory=dict)


class Engine:
    """Owns the trunk's parameters and their optimizer.

    Args:
        trunk: The trunk segment, adapters attached.
        plan: The federation's plan.

    Attributes:
        next_step: First step that the trunk's parameters do not contain yet.
    """

    def __init__(self, trunk: Trunk, plan: FederationPlan) -> None:
        self.trunk = trunk
        self.plan = plan
        trains = plan.trains_trunk
        self.passes = TrunkPasses(trunk, plan.seed, plan.training.max_batch_tokens, trains=trains)
        self.next_step = 0
        self.optimizer = SegmentOptimizer(adapters.trainable(trunk), plan.optimizer, plan.num_steps)

    def reset(self) -> None:
        """Forget all graphs and gradients of the step under way."""
        self.passes.reset()
        self.optimizer.zero_grad()

    def finish(
        self,
        step: int,
        num_target_tokens: int,
        clients_squared_norm: float,
        client_gradients: Mapping[str, Tensors],
    ) -> Outcome:
        """Apply the optimizer step.

        Args:
            step: Step of the run, for the schedule.
            num_target_tokens: Over all clients of the step; gradients of summed losses are divided by it.
            clients_squared_norm: Sum of the clients' squared gradient norms (for `clip_scope = "global"`).
            client_gradients: With `sync = "step"`, the clients' gradients of summed losses, in the plan's order.

        Raises:
            NonFiniteError: A gradient is not finite, or far too large: the trunk's own, or a client's, whom the error
                then names. No parameter was changed; call `reset` before the step is tried again.
        """
        scale, settings = 1.0 / max(1, num_target_tokens), self.plan.optimizer
        summed: dict[str, torch.Tensor] = {}
        trunk_norm = self._own_squared_norm(step, scale)
        if self.plan.aggregation.sync == "step":
            check_gradients(client_gradients)
            own = {name: gradient.cpu() for name, gradient in self.optimizer.gradients().items()}
            summed = sum_gradients([own, *client_gradients.values()])
            self.optimizer.set_gradients({name: summed[name] for name in own})
            total = float(sum(g.double().pow(2).sum() for g in summed.values())) * scale * scale
            if not math.isfinite(total):
                raise NonFiniteError(_overflowed(f"The gradients of step {step}, summed over trunk and clients,"))
        else:
            total = trunk_norm
            if settings.clip_scope == "global":
                total += clients_squared_norm
        coefficient = clip_coefficient(total, settings.max_norm) if settings.max_norm > 0 else 1.0
        self.optimizer.step(step, scale, coefficient)
        self.optimizer.zero_grad()
        self.passes.reset()
        self.next_step = step + 1
        shared = coefficient if settings.clip_scope == "global" else 1.0
        return Outcome(step, num_target_tokens, shared, summed)

    def _own_squared_norm(self, step: int, scale: float) -> float:
        try:
            return self.optimizer.squared_norm(scale)
        except NonFiniteError:
            raise TrunkOverflow(_overflowed(f"The trunk's gradient of step {step}")) from None

    def shares(self, step: int, passes: Mapping[str, Sequence[Pass]]) -> dict[str, float]:
        """What each client alone does to the trunk's gradient; only to find out who made it overflow.

        All gradients and graphs of the step are lost.

        Args:
            step: Step of the run.
            passes: Client to its micro-batches, as they came.

        Returns:
            Client to the norm of its share, infinite if that overflows already.

        Raises:
            NonFiniteError: As `TrunkPasses`, with the client's name.
        """
        norms = {}
        for name, batches in passes.items():
            self.reset()
            for slot, entry, gradient in batches:
                self.passes.forward(step, slot, [entry])
                self.passes.backward(slot, {name: gradient})
            try:
                norms[name] = math.sqrt(self.optimizer.squared_norm(1.0))
            except NonFiniteError:
                norms[name] = math.inf
        self.reset()
        return norms

    def average(self, contributions: Mapping[str, Contribution]) -> dict[str, torch.Tensor]:
        """Aggregate a round; where the trunk holds a parameter that a client also holds, the trunk takes part.

        Args:
            contributions: Client to its parameters and weight; used in the plan's order.

        Returns:
            The aggregate by name; the trunk has taken over what it holds of it.
        """
        ordered = [contributions[name] for name in self.plan.client_names if name in contributions]
        if self.plan.aggregation.method != "mean" and len(ordered) < LEAST:
            log.warning(
                "This round is made of %d clients' parameters, and %s limits nothing with fewer than %d: it is their "
                "plain average. Raise training.min_clients or training.wait.",
                len(ordered),
                self.plan.aggregation.method,
                LEAST,
            )
        own = {name: tensor.cpu() for name, tensor in adapters.read(self.trunk).items()}
        at_clients = {name for contribution in ordered for name in contribution.tensors}
        shared = {name: own[name] for name in own.keys() & at_clients}
        users = [Contribution({n: t for n, t in shared.items() if n not in c.tensors}, c.weight) for c in ordered]
        result = aggregate([*ordered, *(user for user in users if user.tensors)], self.plan.aggregation)
        if shared:
            adapters.load(self.trunk, own | {name: result[name] for name in shared})
        return result

    def take_means(
        self, means: Mapping[str, torch.Tensor], weights: Mapping[str, int], total: int
    ) -> dict[str, torch.Tensor]:
        """Like `average`, of means over the clients that hold each parameter, with the clients' values unknown.

        Args:
            means: By name.
            weights: Weight of each mean.
            total: Weight of all clients of the round: where the trunk holds a parameter, it stands for the others.
        """
        own = {name: tensor.cpu() for name, tensor in adapters.read(self.trunk).items()}
        shared, result = own.keys() & means.keys(), dict(means)
        for name in shared:
            parts = [means[name], own[name]]
            result[name] = mean(parts, [float(weights[name]), float(total - weights[name])])
        if shared:
            adapters.load(self.trunk, own | {name: result[name] for name in shared})
        return result

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trunk's trained parameters, copied."""
        return self.optimizer.values()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint needs: parameters and optimizer state."""
        return {f"parameter.{name}": tensor for name, tensor in self.parameters().items()} | self.optimizer.tensors()

    def load_tensors(self, tensors: Tensors) -> None:
        """Restore what `tensors` gave."""
        prefix = "parameter."
        adapters.load(self.trunk, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.optimizer.load_tensors({n: t for n, t in tensors.items() if not n.startswith(prefix)})


def _overflowed(what: str) -> str:
    return (
        f"{what} overflowed; the step was not applied. Lower optimizer.learning_rate, or use a wider model.dtype or "
        "wire codec, and start the run again."
    )


def check_gradients(client_gradients: Mapping[str, Tensors]) -> None:
    """Whether every client's gradients are such that their sum can be one.

    Raises:
        NonFiniteError: Names the first client whose are not.
    """
    for client, tensors in client_gradients.items():
        for tensor in tensors.values():
            check_gradient(client, tensor)


def at_fault(step: int, shares: Mapping[str, float]) -> NonFiniteError:
    """The error for a trunk's gradient that overflowed, by what each client alone contributes.

    It names a client if that one's share dwarfs what another one contributes, or if the step had no other client:
    the step can then be tried without it.

    >>> at_fault(3, {"a": 1.0, "b": float("inf")}).client
    'b'
    >>> at_fault(3, {"a": 2e38, "b": 3e38}).client
    ''
    """
    worst = max(shares, key=lambda name: shares[name])
    if len(shares) == 1 or shares[worst] > _MUCH_LARGER * min(shares.values()):
        return NonFiniteError(
            f"The trunk's gradient overflowed in step {step}, by what client {worst} sent: the step was not applied. "
            "Look for a NaN or an overflow at that client, or lower optimizer.learning_rate.",
            worst,
        )
    return NonFiniteError(
        _overflowed(f"The trunk's gradient of step {step} (the largest contribution is that of client {worst})")
    )
