"""Grouped forward and backward passes through the trunk, with the graphs kept in between.

A *slot* is the micro-batches of several clients that run as one batch; its graph is kept until its gradients
arrive. Used by the server's engine and by a trunk in the client's own process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsea.errors import NonFiniteError
from fedsea.model import adapters
from fedsea.model.segments import Trunk
from fedsea.model.trunk import TrunkPart
from fedsea.tensors import all_finite
from fedsea.types import BlockRange

LARGEST_GRADIENT = 1e20
"""Of one value at the trunk's output; a larger one would overflow in the trunk, where nobody could be named for it."""


def check_gradient(client: str, gradient: torch.Tensor) -> None:
    """Whether a tensor that a client sent can be a gradient.

    Raises:
        NonFiniteError: It is not finite, or far too large; the message names the client.
    """
    if gradient.numel() and not float(torch.linalg.vector_norm(gradient, torch.inf)) <= LARGEST_GRADIENT:
        raise NonFiniteError(
            f"The gradient that client {client} sent is too large to be one (over {LARGEST_GRADIENT:g}): the step was "
            "not applied. Look for a NaN or an overflow at that client.",
            client,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One client's micro-batch as it enters the trunk.

    Attributes:
        hidden_TH: Hidden states at the trunk's input.
        lengths: Tokens of each sequence.
        blocks: Blocks to run.
        needs_gradient: Whether the client wants the gradient at the trunk's input.
    """

    client: str
    hidden_TH: torch.Tensor
    lengths: tuple[int, ...]
    blocks: BlockRange
    needs_gradient: bool

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)


@dataclass(slots=True)
class _Graph:
    """One batch's live autograd graph: inputs that want gradients, and outputs."""

    entries: list[Entry]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class TrunkPasses:
    """Runs slots through a trunk and sums the gradients of its parameters.

    Args:
        trunk: The trunk segment, adapters attached.
        seed: The plan's seed; with step and slot it seeds dropout.
        max_batch_tokens: A slot with more tokens runs as several batches.
        trains: Whether the trunk has trained parameters.
    """

    def __init__(self, trunk: Trunk, seed: int, max_batch_tokens: int, *, trains: bool) -> None:
        self.trunk = trunk
        self.seed = seed
        self.max_batch_tokens = max_batch_tokens
        self.trains = trains
        self._graphs: dict[int, list[_Graph]] = {}

    def forward(self, step: int, slot: int, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """Run a slot's micro-batches as one batch (several, past `max_batch_tokens`) and keep the graph.

        Returns:
            Client to hidden states at the trunk's output, float32, detached.
        """
        self.trunk.switch(training=True)
        graphs, results = [], {}
        for number, batch in enumerate(self._batches(entries)):
            inputs = [e.hidden_TH.detach().to(self.trunk.device).requires_grad_(e.needs_gradient) for e in batch]
            parts = [TrunkPart(x, e.lengths, e.blocks) for x, e in zip(inputs, batch, strict=True)]
            seed = adapters.derive_seed(self.seed, "trunk", step, slot, number)
            with adapters.seeded(seed), torch.set_grad_enabled(self.trains or any(e.needs_gradient for e in batch)):
                outputs = self.trunk.forward_group(parts)
            for entry, output in zip(batch, outputs, strict=True):
                if not all_finite(output):
                    raise NonFiniteError(
                        f"The trunk's output for client {entry.client} is not finite: the step was not applied. Lower "
                        "the learning rate, or use bf16 or fp32 instead of fp16.",
                        entry.client,
                    )
            graphs.append(_Graph(list(batch), inputs, outputs))
            results.update({e.client: out.detach() for e, out in zip(batch, outputs, strict=True)})
        self._graphs[slot] = graphs
        return results

    def backward(self, slot: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Propagate the gradients of a slot; a client without one counts as zero.

        Returns:
            Client to gradient at the trunk's input, None where the client needs none.

        Raises:
            NonFiniteError: A gradient is not finite, or far too large; the message names the client.
        """
        for client, gradient in gradients.items():
            check_gradient(client, gradient)
        # Checkpointed blocks run again here; decoding or evaluation may have come in between.
        self.trunk.switch(training=True)
        results: dict[str, torch.Tensor | None] = {}
        for graph in self._graphs.pop(slot):
            pairs = [
                (out, gradients[e.client].to(out))
                for e, out in zip(graph.entries, graph.outputs, strict=True)
                if e.client in gradients and out.requires_grad
            ]
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])
            for entry, x in zip(graph.entries, graph.inputs, strict=True):
                results[entry.client] = self._input_gradient(entry, x) if entry.client in gradients else None
        return results

    @staticmethod
    def _input_gradient(entry: Entry, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        if not entry.needs_gradient:
            return None
        gradient = hidden_TH.grad if hidden_TH.grad is not None else torch.zeros_like(hidden_TH)
        hidden_TH.grad = None
        if not all_finite(gradient):
            raise NonFiniteError(
                f"The gradient that passed back through the trunk for client {entry.client} is not finite: the step "
                "was not applied. Lower the learning rate, or use bf16 or fp32 instead of fp16.",
                entry.client,
            )
        return gradient

    def _batches(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        batches: list[list[Entry]] = [[]]
        tokens = 0
        for entry in entries:
            if batches[-1] and tokens + entry.num_tokens > self.max_batch_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(entry)
            tokens += entry.num_tokens
        return batches

    def evaluate(self, entry: Entry) -> torch.Tensor:
        """Forward without a graph, adapters in evaluation mode; shape as the entry's hidden states."""
        self.trunk.switch(training=False)
        with torch.no_grad():
            return self.trunk.forward(entry.hidden_TH.to(self.trunk.device), entry.lengths, entry.blocks)

    def pull_back(self, entry: Entry, gradient_TH: torch.Tensor) -> torch.Tensor:
        """Gradient [T, H] at the trunk's input, of what `evaluate` computes; no parameter gets one.

        Args:
            entry: The micro-batch, as it was evaluated.
            gradient_TH: Gradient at the trunk's output.

        Raises:
            NonFiniteError: As `backward`.
        """
        check_gradient(entry.client, gradient_TH)
        self.trunk.switch(training=False)
        hidden_TH = entry.hidden_TH.detach().to(self.trunk.device).requires_grad_()
        with torch.enable_grad():
            output_TH = self.trunk.forward(hidden_TH, entry.lengths, entry.blocks)
        (hidden_TH.grad,) = torch.autograd.grad(output_TH, hidden_TH, gradient_TH.to(output_TH))
        found = self._input_gradient(entry, hidden_TH)
        assert found is not None
        return found

    def reset(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
