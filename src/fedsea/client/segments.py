"""The client's two segments with their optimizers: what is computed here, and what is trained here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsea.errors import NonFiniteError
from fedsea.model import adapters
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.model.segments import InputBlocks, OutputBlocks
from fedsea.plan import FederationPlan
from fedsea.types import BlockRange, TokenBatch

Tensors = Mapping[str, torch.Tensor]


class ClientSegments:
    """Input and output blocks of one client, trained together.

    Args:
        plan: The federation's plan.
        name: The client's name; with the plan's seed it seeds dropout.
        input_blocks: Adapters attached, as is `output_blocks`.
    """

    def __init__(self, plan: FederationPlan, name: str, input_blocks: InputBlocks, output_blocks: OutputBlocks) -> None:
        self.plan = plan
        self.name = name
        self.input_blocks = input_blocks
        self.output_blocks = output_blocks
        self._optimizers = tuple(
            SegmentOptimizer(adapters.trainable(segment), plan.optimizer, plan.num_steps)
            for segment in (input_blocks, output_blocks)
        )
        self.device = output_blocks.device
        self.trains_input = plan.trains_below_cut(name)
        self.sends_gradients = plan.sends_gradients(name)

    @property
    def trunk_blocks(self) -> BlockRange:
        """The blocks between the two segments."""
        return BlockRange(self.input_blocks.blocks.stop, self.output_blocks.blocks.start)

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self.input_blocks.switch(training=mode)
        self.output_blocks.switch(training=mode)

    def embed(self, batch: TokenBatch, update: int, number: int) -> torch.Tensor:
        """Hidden states [T, H] at the cut for training; with a graph if the input segment is trained."""
        seed = adapters.derive_seed(self.plan.seed, self.name, "input", update, number)
        with adapters.seeded(seed), torch.set_grad_enabled(self.trains_input):
            return self.input_blocks(batch.input_ids_T.to(self.device), batch.lengths)

    def head(
        self, batch: TokenBatch, hidden_TH: torch.Tensor, update: int, number: int
    ) -> tuple[float, torch.Tensor | None]:
        """Loss and its backward pass down to the trunk's output.

        Args:
            batch: The micro-batch whose targets are used.
            hidden_TH: What the trunk gave back.
            update: This client's count of applied steps; with `number` it seeds dropout.
            number: Micro-batch.

        Returns:
            Summed loss, and its gradient [T, H] at the trunk's output (None if nothing upstream is trained).

        Raises:
            NonFiniteError: The loss is NaN or infinite; no optimizer step was taken.
        """
        hidden_TH = hidden_TH.detach().to(self.device).requires_grad_(self.sends_gradients)
        seed = adapters.derive_seed(self.plan.seed, self.name, "output", update, number)
        with adapters.seeded(seed):
            loss = self.output_blocks.loss(hidden_TH, batch.lengths, batch.targets_T.to(self.device))
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss of client {self.name} is not finite: the step was not applied. Lower the learning rate, or "
                "use bf16 or fp32 instead of fp16.",
                self.name,
            )
        if loss.requires_grad:
            torch.autograd.backward(loss)
        return float(loss.detach()), hidden_TH.grad

    def evaluate_embed(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [T, H] at the cut without a graph."""
        with torch.no_grad():
            hidden_TH: torch.Tensor = self.input_blocks(batch.input_ids_T.to(self.device), batch.lengths)
            return hidden_TH

    def evaluate_head(self, batch: TokenBatch, hidden_TH: torch.Tensor) -> float:
        """Summed loss without a graph."""
        with torch.no_grad():
            hidden_TH, targets_T = hidden_TH.to(self.device), batch.targets_T.to(self.device)
            return float(self.output_blocks.loss(hidden_TH, batch.lengths, targets_T))

    def zero_grad(self) -> None:
        """Forget the gradients of the step under way."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the summed loss by portable name."""
        return {name: g for optimizer in self._optimizers for name, g in optimizer.gradients().items()}

    def squared_norm(self, scale: float) -> float:
        """Squared norm of the gradients times `scale`, over both segments.

        Raises:
            NonFiniteError: A gradient is NaN or infinite.
        """
        return sum(optimizer.squared_norm(scale) for optimizer in self._optimizers)

    def apply(self, gradients: Tensors, step: int, scale: float, shared_clip: float) -> None:
        """One optimizer step.

        Args:
            gradients: Of the summed loss, by name; those of other segments are ignored.
            step: Step of the run, for the schedule.
            scale: One over the target tokens that the gradients sum over.
            shared_clip: Factor agreed on with the other segments (`clip_scope = "global"`).
        """
        settings = self.plan.optimizer
        for optimizer in self._optimizers:
            optimizer.set_gradients({name: gradients[name] for name in optimizer.parameters})
            clip = shared_clip
            if settings.clip_scope == "segment" and settings.max_norm > 0:
                clip = clip_coefficient(optimizer.squared_norm(scale), settings.max_norm)
            optimizer.step(step, scale, clip)
            optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        """Trained parameters by portable name, copied."""
        return {name: value for optimizer in self._optimizers for name, value in optimizer.values().items()}

    def load_parameters(self, tensors: Tensors) -> None:
        """Take over trained parameters; names must be exactly those of `parameters`."""
        for segment in (self.input_blocks, self.output_blocks):
            adapters.load(segment, {name: tensors[name] for name in adapters.trainable(segment)})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint needs."""
        result = {f"parameter.{name}": tensor for name, tensor in self.parameters().items()}
        for side, optimizer in zip(("input", "output"), self._optimizers, strict=True):
            result |= {f"{side}.{name}": tensor for name, tensor in optimizer.tensors().items()}
        return result

    def load_tensors(self, tensors: Tensors) -> None:
        """Restore what `tensors` gave."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.load_parameters(under("parameter."))
        for side, optimizer in zip(("input", "output"), self._optimizers, strict=True):
            optimizer.load_tensors(under(f"{side}."))
