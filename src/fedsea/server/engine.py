"""The trunk's arithmetic at the server: passes, the optimizer step, aggregation.

Every method runs on the engine thread, one at a time, and knows nothing of connections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedsea.errors import NonFiniteError
from fedsea.federation.aggregation import Contribution, aggregate, sum_gradients
from fedsea.model import adapters
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.model.passes import TrunkPasses
from fedsea.model.segments import Trunk
from fedsea.plan import FederationPlan

Tensors = Mapping[str, torch.Tensor]


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
    """

    def __init__(self, trunk: Trunk, plan: FederationPlan) -> None:
        self.trunk = trunk
        self.plan = plan
        trains = plan.adapter.trunk != "frozen"
        self.passes = TrunkPasses(trunk, plan.seed, plan.training.max_batch_tokens, trains=trains)
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
        client_gradients: Sequence[Tensors],
    ) -> Outcome:
        """Apply the optimizer step.

        Args:
            step: Step of the run, for the schedule.
            num_target_tokens: Over all clients of the step; gradients of summed losses are divided by it.
            clients_squared_norm: Sum of the clients' squared gradient norms (for `clip_scope = "global"`).
            client_gradients: With `sync = "step"`, the clients' gradients of summed losses, in the plan's order.

        Raises:
            NonFiniteError: A gradient is not finite; nothing was changed but the gradients, which are cleared.
        """
        scale, settings = 1.0 / max(1, num_target_tokens), self.plan.optimizer
        summed: dict[str, torch.Tensor] = {}
        if self.plan.aggregation.sync == "step":
            own = {name: gradient.cpu() for name, gradient in self.optimizer.gradients().items()}
            summed = sum_gradients([own, *client_gradients])
            self.optimizer.set_gradients({name: summed[name] for name in own})
            total = float(sum(g.double().pow(2).sum() for g in summed.values())) * scale * scale
            if not math.isfinite(total):
                raise NonFiniteError(
                    "The gradients of the step, summed over its clients, are not finite; the step was not applied. "
                    "Lower optimizer.learning_rate, or use a wider model.dtype or wire codec."
                )
        else:
            total = self.optimizer.squared_norm(scale)
            if settings.clip_scope == "global":
                total += clients_squared_norm
        coefficient = clip_coefficient(total, settings.max_norm) if settings.max_norm > 0 else 1.0
        self.optimizer.step(step, scale, coefficient)
        self.optimizer.zero_grad()
        self.passes.reset()
        shared = coefficient if settings.clip_scope == "global" else 1.0
        return Outcome(step, num_target_tokens, shared, summed)

    def average(self, contributions: Mapping[str, Contribution]) -> dict[str, torch.Tensor]:
        """Aggregate a round; where the trunk holds a parameter that a client also holds, the trunk takes part.

        Args:
            contributions: Client to its parameters and weight; used in the plan's order.

        Returns:
            The aggregate by name; the trunk has taken over what it holds of it.
        """
        ordered = [contributions[name] for name in self.plan.client_names if name in contributions]
        own = {name: tensor.cpu() for name, tensor in adapters.read(self.trunk).items()}
        at_clients = {name for contribution in ordered for name in contribution.tensors}
        shared = {name: own[name] for name in own.keys() & at_clients}
        users = [Contribution({n: t for n, t in shared.items() if n not in c.tensors}, c.weight) for c in ordered]
        result = aggregate([*ordered, *(user for user in users if user.tensors)], self.plan.aggregation)
        if shared:
            adapters.load(self.trunk, own | {name: result[name] for name in shared})
        return result

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trunk's trained parameters, copied."""
        return adapters.read(self.trunk)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint needs: parameters and optimizer state."""
        return {f"parameter.{name}": tensor for name, tensor in self.parameters().items()} | self.optimizer.tensors()

    def load_tensors(self, tensors: Tensors) -> None:
        """Restore what `tensors` gave."""
        prefix = "parameter."
        adapters.load(self.trunk, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.optimizer.load_tensors({n: t for n, t in tensors.items() if not n.startswith(prefix)})
