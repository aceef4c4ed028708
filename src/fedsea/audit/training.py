"""A client and its server in one process, with the real boundary and the real bytes in between.

For the attacks that need a model which was trained, or updates that left a client.

T  tokens of a micro-batch, H  hidden size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from fedsea.client import setup
from fedsea.client.segments import ClientSegments
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.loading import trainable_trunk
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.model.passes import Entry, TrunkPasses
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.types import IGNORE, Channel, Purpose, Release, TokenBatch
from fedsea.wire.codecs import CODECS
from fedsea.wire.encoding import Encoder

Tensors = dict[str, torch.Tensor]


def pack(texts: Sequence[torch.Tensor]) -> TokenBatch:
    """A micro-batch of texts as ids, with loss everywhere."""
    targets = [torch.cat([ids_T[1:], torch.tensor([IGNORE])]) for ids_T in texts]
    return TokenBatch(torch.cat(list(texts)), torch.cat(targets), tuple(len(ids_T) for ids_T in texts))


def batches_of(texts: Sequence[torch.Tensor], size: int, steps: int, seed: int = 0) -> Iterable[TokenBatch]:
    """Micro-batches for so many steps; every text comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < min(size, len(texts)):
            order += torch.randperm(len(texts), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield pack([texts[number] for number in chosen])


class SplitRun:
    """One client of a plan and the trunk that it trains with.

    Args:
        plan: The plan; its noise and codecs are in force.
        checkpoint: The base model.
        name: The client; "" for the plan's first.
        key: Of the noise, for a run that can be repeated; 32 bytes.

    Attributes:
        step: Optimizer steps so far.
        output_TH: The trunk's outputs for the latest micro-batch.
    """

    def __init__(self, plan: FederationPlan, checkpoint: Checkpoint, name: str = "", key: bytes | None = None) -> None:
        self.plan, self.name = plan, name or plan.client_names[0]
        self.segments: ClientSegments = setup.load_segments(plan, checkpoint, self.name, "cpu")
        self.trunk = trainable_trunk(plan, checkpoint, self.segments.trunk_blocks)
        self._encoder = Encoder("client", {Channel.HIDDEN: plan.wire.hidden, Channel.GRADIENT: plan.wire.gradient})
        self._begin(key)

    def _begin(self, key: bytes | None) -> None:
        plan = self.plan
        self._passes = TrunkPasses(self.trunk, plan.seed, plan.training.max_batch_tokens, trains=plan.trains_trunk)
        self._optimizer = SegmentOptimizer(adapters.trainable(self.trunk), plan.optimizer, plan.num_steps)
        self._boundary = Boundary.of(plan, self.name, key=key)
        self.output_TH = torch.empty(0)
        self.step = 0

    def begin_again(self, parameters: Mapping[str, torch.Tensor], key: bytes | None = None) -> None:
        """As a run begins, with the models that are loaded already.

        Args:
            parameters: As `parameters` gave them before the first step.
            key: Of the noise from now on.
        """
        ends = self.segments
        self.segments = ClientSegments(self.plan, self.name, ends.input_blocks, ends.output_blocks)
        self.segments.zero_grad()
        self.segments.load_parameters(parameters)
        adapters.load(self.trunk, {name: parameters[name] for name in adapters.trainable(self.trunk)})
        self._begin(key)
        self._optimizer.zero_grad()

    def arrives(self, release: Release) -> Tensors:
        """What the server decodes of a release's bytes."""
        sealed = self._encoder.seal(release)
        raw = torch.cat([torch.frombuffer(bytearray(piece.tobytes()), dtype=torch.uint8) for piece in sealed.pieces])
        found, start = {}, 0
        for spec in sealed.specs:
            codec = CODECS[spec.codec]
            found[spec.name] = torch.empty(spec.shape)
            codec.decode(raw[start : start + codec.num_bytes(spec.shape)], found[spec.name])
            start += codec.num_bytes(spec.shape)
        return found

    def gradients(self, batch: TokenBatch) -> tuple[float, Tensors]:
        """One micro-batch forward and backward through both sides; both sides' gradients are kept.

        Returns:
            The summed loss, and the client's gradients as the server receives them under `sync = "step"`.
        """
        segments, boundary = self.segments, self._boundary
        segments.zero_grad()
        self._optimizer.zero_grad()
        segments.train(True)
        hidden_TH = segments.embed(batch, self.step, 0)
        origin = batch.origin(Purpose.TRAINING)
        received_TH = self.arrives(boundary.hidden(hidden_TH, origin))[""]
        wants = segments.trains_input
        entry = Entry(self.name, received_TH, batch.lengths, segments.trunk_blocks, wants)
        output_TH = self._passes.forward(self.step, 0, [entry])[self.name]
        self.output_TH = output_TH.detach()
        loss, gradient_TH = segments.head(batch, output_TH, self.step, 0)
        if gradient_TH is not None:
            sent_TH = self.arrives(boundary.gradient(gradient_TH, origin))[""]
            pulled_TH = self._passes.backward(0, {self.name: sent_TH})[self.name]
            if pulled_TH is not None:
                torch.autograd.backward(hidden_TH, pulled_TH.to(hidden_TH))
        self._passes.reset()
        return loss, self.arrives(boundary.update(segments.gradients()))

    def train(self, batches: Iterable[TokenBatch], told: Callable[[int], None] = lambda _: None) -> list[float]:
        """One optimizer step for each micro-batch, as a run of the plan would take it.

        Returns:
            Mean loss before each step.
        """
        losses, settings = [], self.plan.optimizer
        for batch in batches:
            told(self.step)
            loss, _ = self.gradients(batch)
            scale = 1.0 / batch.num_target_tokens
            norms = self._optimizer.squared_norm(scale), self.segments.squared_norm(scale)
            clip = clip_coefficient(sum(norms), settings.max_norm) if settings.clip_scope == "global" else 1.0
            own = clip if settings.clip_scope == "global" else clip_coefficient(norms[0], settings.max_norm)
            self._optimizer.step(self.step, scale, own)
            self.segments.apply(self.segments.gradients(), self.step, scale, clip)
            losses.append(loss / batch.num_target_tokens)
            self.step += 1
        return losses

    def parameters(self) -> Tensors:
        """What was trained on both sides, by name, copied."""
        return self.segments.parameters() | adapters.read(self.trunk)

    def update(self, before: Mapping[str, torch.Tensor] | None = None) -> Tensors:
        """What the server receives of the client's parameters at the end of a round, minus what they were before."""
        sent = self.arrives(self._boundary.update(self.segments.parameters(), before))
        return sent if before is None else {name: sent[name] - before[name] for name in sent}

    def losses(self, texts: Sequence[torch.Tensor], *, noised: bool = True, at_once: int = 16) -> list[float]:
        """Mean loss of each text in nats a token, in evaluation mode.

        Args:
            texts: Ids.
            noised: As it is in use, with the plan's noise on the hidden states; else as the parameters alone have it.
            at_once: Texts of a micro-batch.
        """
        self.segments.train(False)
        found = []
        for start in range(0, len(texts), at_once):
            batch = pack(texts[start : start + at_once])
            hidden_TH = self.segments.evaluate_embed(batch)
            if noised:
                hidden_TH = self.arrives(self._boundary.hidden(hidden_TH, batch.origin(Purpose.EVALUATION)))[""]
            entry = Entry(self.name, hidden_TH, batch.lengths, self.segments.trunk_blocks, False)
            output_TH = self._passes.evaluate(entry)
            with torch.no_grad():
                logits_TV = self.segments.output_blocks(output_TH, batch.lengths).float()
            rows_T = torch.nn.functional.cross_entropy(
                logits_TV, batch.targets_T, reduction="none", ignore_index=IGNORE
            )
            parts = torch.split(rows_T, list(batch.lengths))
            found += [float(part.sum()) / max(1, len(part) - 1) for part in parts]
        return found

    def perplexity(self, texts: Sequence[torch.Tensor]) -> float:
        """Over all texts, with the plan's noise."""
        weights = [len(ids_T) - 1 for ids_T in texts]
        total = sum(loss * weight for loss, weight in zip(self.losses(texts), weights, strict=True))
        return math.exp(min(total / sum(weights), 700.0))
