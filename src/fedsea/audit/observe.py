"""What the server sees: texts go the client's own way, up to the very bytes, and are decoded as the server does.

Input blocks, privacy boundary and wire encoder are the client's; decoder and trunk the server's. Nothing is sent.

T  tokens of a sequence, H  hidden size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsea.audit.targets import Observation, Progress, Target, unheard
from fedsea.client import setup
from fedsea.client.segments import ClientSegments
from fedsea.errors import ProtocolError
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.loading import trainable_trunk
from fedsea.model.segments import Trunk
from fedsea.plan import FederationPlan, NoiseSection, open_channels
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.clip import clip_rows, clip_sequences
from fedsea.types import Channel, Purpose, Release, Reply, TokenBatch
from fedsea.wire import messages as m
from fedsea.wire.encoding import Decoder, Encoder, Sealed

Change = Callable[[torch.Tensor], torch.Tensor]

_TAPPED_EPOCHS = 2


@dataclass(frozen=True, slots=True)
class Tapped:
    """One release's values before the boundary and behind the decoder.

    Attributes:
        raw_TH: As they were computed.
        seen_TH: As the server decodes them.
        most_rows: Rows that its session may have in the end; 0 if it is a whole sequence, or an update.
    """

    raw_TH: torch.Tensor
    seen_TH: torch.Tensor
    most_rows: int = 0


def clipped(tapped: Tapped, channel: Channel, noise: NoiseSection) -> torch.Tensor:
    """What a plan's noise is added to; an update is clipped as one block, whatever the unit is."""
    clip, raw_TH = noise.clip(channel), tapped.raw_TH
    if not clip:
        return raw_TH
    if noise.unit == "token" and channel is not Channel.UPDATE:
        return clip_rows(raw_TH, clip)
    if tapped.most_rows:
        return clip_rows(raw_TH, clip / tapped.most_rows**0.5)
    return clip_sequences(raw_TH, (len(raw_TH),), clip)


Passed = Callable[[Target, Observation, list[Tapped]], None]


class Tap:
    """A client and its server in this process, with the bytes between them laid open.

    Args:
        plan: Codecs, noise and cut are its.
        checkpoint: The base model.
        name: The client; the plan's first one if empty.
        parameters: Trained parameters of the client's segments by portable name; None: as a run begins.
        trunk: Those of the trunk.
        boundary: The maker of releases; None: the plan's own, with nothing counted, as nothing leaves.
        key: Of the noise, for an audit that can be repeated; 32 bytes.
        change: Applied to the hidden states before the boundary: a defence that is tried out.
        device: Where the models run.
        beside: Another tap whose models are used, with what it has of `parameters` and `trunk`, instead of loading the
            same ones again: its plan may differ in noise and codecs alone.
    """

    def __init__(
        self,
        plan: FederationPlan,
        checkpoint: Checkpoint,
        name: str = "",
        parameters: Mapping[str, torch.Tensor] | None = None,
        *,
        trunk: Mapping[str, torch.Tensor] | None = None,
        boundary: Boundary | None = None,
        key: bytes | None = None,
        change: Change | None = None,
        device: str = "cpu",
        beside: Tap | None = None,
    ) -> None:
        self.name = name or plan.client_names[0]
        self.plan = plan
        if beside is None:
            self.segments, self.trunk = _models(plan, checkpoint, self.name, parameters, trunk, device)
        else:
            assert _cut_alike(plan, beside.plan, self.name), "these are other models"
            self.segments, self.trunk = beside.segments, beside.trunk
        self.boundary = boundary or Boundary.of(plan, self.name, key=key)
        self.change = change
        codecs = {Channel.HIDDEN: plan.wire.hidden, Channel.GRADIENT: plan.wire.gradient}
        limits = setup.wire_limits(plan, checkpoint, self.name)
        self._encoders = {"client": Encoder("client", codecs), "server": Encoder("server", codecs)}
        self._decoders = {"client": Decoder(limits, "client"), "server": Decoder(limits, "server")}
        self._steps = 0
        self._loss, self._loss_tokens = 0.0, 0

    @property
    def perplexity(self) -> float:
        """Of the model over everything that was sent, with the defences in force; 0 if nothing was."""
        return math.exp(min(self._loss / self._loss_tokens, 80.0)) if self._loss_tokens else 0.0

    def perplexity_alone(self, targets: Sequence[Target]) -> float:
        """Of the client without any server: its input and output blocks, nothing between."""
        total, tokens = 0.0, 0
        for target in targets:
            batch = _batch(target)
            total += self.segments.evaluate_head(batch, self.segments.evaluate_embed(batch))
            tokens += batch.num_target_tokens
        return math.exp(min(total / max(1, tokens), 80.0))

    def observe(
        self,
        targets: Sequence[Target],
        epochs: int = 1,
        progress: Progress = unheard,
        passed: Passed = lambda *_: None,
    ) -> list[list[Tapped]]:
        """Send every target in every epoch; each gets an observation for each.

        Args:
            targets: What is sent.
            epochs: How often.
            progress: Told of sequences.
            passed: Told of each pass: the target, its observation, and what was before the boundary.

        Returns:
            For every target, in the first epoch and then in the second, what was before the boundary: [hidden states,
            gradients if any]. Two epochs, as noise may come again in the next one.
        """
        kept: list[list[Tapped]] = []
        for epoch in range(epochs):
            for number, target in enumerate(targets):
                observation, tapped = self.send(target)
                target.observations.append(observation)
                passed(target, observation, tapped)
                if epoch < _TAPPED_EPOCHS:
                    kept.append(tapped)
                progress(epoch * len(targets) + number + 1, epochs * len(targets))
        return kept

    def send(self, target: Target) -> tuple[Observation, list[Tapped]]:
        """One training pass of one sequence."""
        self._steps += 1
        batch = _batch(target)
        length = batch.lengths
        origin = batch.origin(Purpose.TRAINING)
        with torch.no_grad():
            hidden_TH = self.segments.embed(batch, self._steps, 0).detach()
        if self.change is not None:
            hidden_TH = self.change(hidden_TH)
        blocks, weight = self.segments.trunk_blocks, batch.num_target_tokens
        release = self.boundary.hidden(hidden_TH, origin)
        forward = m.Forward(self._steps, 0, 0, 1, blocks, length, weight, False, release)
        seen_TH = self.over("client", "server", forward)
        tapped = [Tapped(hidden_TH.float().cpu(), seen_TH.cpu())]
        with torch.no_grad():
            output_TH = self.trunk(seen_TH.to(self.trunk.device), length)
        reply = m.Output(self._steps, 0, 0, False, Reply({"": output_TH}))
        answered_TH = self.over("server", "client", reply)
        if not self.segments.sends_gradients or not weight:
            self._count(self.segments.evaluate_head(batch, answered_TH), weight)
            return Observation(seen_TH, None, length[0], output_TH.float().cpu()), tapped
        loss, gradient_TH = self.segments.head(batch, answered_TH, self._steps, 0)
        self._count(loss, weight)
        self.segments.zero_grad()
        if gradient_TH is None:
            raise ProtocolError("The output blocks gave no gradient, though the plan sends one; update fedsea.")
        sent: Release = self.boundary.gradient(gradient_TH, origin)
        seen_gradient_TH = self.over("client", "server", m.Backward(self._steps, 0, 0, sent))
        tapped.append(Tapped(gradient_TH.detach().float().cpu(), seen_gradient_TH.cpu()))
        return Observation(seen_TH, seen_gradient_TH, length[0], output_TH.float().cpu()), tapped

    def evaluate(self, targets: Sequence[Target]) -> list[Tapped]:
        """Send hidden states as an evaluation does; nothing is noted in the targets."""
        tapped = []
        for number, target in enumerate(targets):
            batch = _batch(target)
            hidden_TH = self.segments.evaluate_embed(batch)
            if self.change is not None:
                hidden_TH = self.change(hidden_TH)
            release = self.boundary.hidden(hidden_TH, batch.origin(Purpose.EVALUATION))
            blocks, weight = self.segments.trunk_blocks, batch.num_target_tokens
            forward = m.Forward(number, 0, 0, 1, blocks, batch.lengths, weight, True, release)
            tapped.append(Tapped(hidden_TH.float().cpu(), self.over("client", "server", forward).cpu()))
        return tapped

    def tap_update(self) -> Tapped | None:
        """The client's parameters as a round's update, over the same bytes; None if the plan lets none leave."""
        if Channel.UPDATE not in open_channels(self.plan, self.name):
            return None
        parameters = self.segments.parameters()
        release = self.boundary.update(parameters)
        message = m.RoundUpdate(0, 1, release)
        arrived: m.Message | None = None
        for chunk in self._encoders["client"].encode(message).chunks:
            arrived = self._decoders["server"].feed(chunk)
        seen = arrived.tensors  # type: ignore[union-attr]
        names = sorted(parameters)
        raw_N = torch.cat([parameters[name].float().flatten().cpu() for name in names])
        seen_N = torch.cat([seen[name].float().flatten().cpu() for name in names])  # type: ignore[index]
        return Tapped(raw_N[:, None], seen_N[:, None])

    def _count(self, loss: float, weight: int) -> None:
        self._loss, self._loss_tokens = self._loss + loss, self._loss_tokens + weight

    def seal(self, release: Release) -> Sealed:
        """A release as the client's encoder seals it, to be put into a message."""
        return self._encoders["client"].seal(release)

    def over(self, sender: str, receiver: str, message: m.Message) -> torch.Tensor:
        """A message's tensor as its receiver decodes it from the sender's bytes."""
        arrived: m.Message | None = None
        for chunk in self._encoders[sender].encode(message).chunks:
            arrived = self._decoders[receiver].feed(chunk)
        tensor: torch.Tensor = arrived.tensors[""]  # type: ignore[union-attr, index]
        return tensor


def _models(
    plan: FederationPlan,
    checkpoint: Checkpoint,
    name: str,
    parameters: Mapping[str, torch.Tensor] | None,
    trained_trunk: Mapping[str, torch.Tensor] | None,
    device: str,
) -> tuple[ClientSegments, Trunk]:
    """The client's and the server's, without dropout."""
    segments = setup.load_segments(plan, checkpoint, name, device)
    if parameters is not None:
        segments.load_parameters(parameters)
    segments.train(False)
    trunk = trainable_trunk(plan, checkpoint, segments.trunk_blocks, device)
    if trained_trunk is not None:
        adapters.load(trunk, trained_trunk)
    return segments, trunk


def _cut_alike(one: FederationPlan, other: FederationPlan, name: str) -> bool:
    """Whether two plans give a client and its server the same models."""
    what = [(plan.model, plan.adapter, plan.partition_of(name), plan.seed) for plan in (one, other)]
    return what[0] == what[1]


def _batch(target: Target) -> TokenBatch:
    return TokenBatch(target.ids_T.long(), target.targets_T.long(), (len(target.ids_T),))
