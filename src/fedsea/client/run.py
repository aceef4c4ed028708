"""What a data owner does: train with a server, train alone, evaluate, export, ask how a server stands."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsea.client import setup
from fedsea.client.evaluation import evaluate as evaluate_batches
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.remote_trunk import RemoteTrunk, seek_invitation
from fedsea.client.renewal import IdentityKeeper
from fedsea.client.segments import ClientSegments
from fedsea.client.setup import ClientOptions
from fedsea.client.state import ClientStore
from fedsea.client.trainer import EvaluationReport, Observer, StepReport, Trainer
from fedsea.client.trunk import Standing, Trunk
from fedsea.data.silo import Silo
from fedsea.errors import ConfigError
from fedsea.model import adapters, export
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.loading import load_trunk
from fedsea.plan import FederationPlan, load_plan
from fedsea.privacy.boundary import Boundary
from fedsea.wire.channel import call_status
from fedsea.wire.identity.identity import Identity

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a training run ended.

    Attributes:
        loss_before: Held-out loss in nats per target token before the first step of this process; None if not taken.
        loss_after: The same at the end.
        bytes_sent: By this process, over the wire.
        bytes_by_kind: The same, and what was received, by kind of message.
        phases_s: Phase to seconds, summed over this process's steps.
    """

    client: str
    next_step: int
    num_target_tokens: int
    loss_before: float | None
    loss_after: float | None
    bytes_sent: int
    bytes_received: int
    bytes_by_kind: Mapping[str, int]
    phases_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """Loss over a silo: nats per target token, and what goes with it."""

    mean_loss: float
    perplexity: float
    num_target_tokens: int


class _Recorder:
    """Passes reports on, and keeps what the summary needs."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self.losses: list[float] = []
        self.tokens = 0
        self.phases: dict[str, float] = {}

    def step(self, report: StepReport) -> None:
        self.tokens += report.num_target_tokens
        for phase, seconds in report.seconds.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        if self._observer is not None:
            self._observer.step(report)

    def evaluation(self, report: EvaluationReport) -> None:
        self.losses.append(report.mean_loss)
        if self._observer is not None:
            self._observer.evaluation(report)

    def summary(self, name: str, next_step: int, traffic: tuple[Mapping[str, int], Mapping[str, int]]) -> TrainSummary:
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        sent, received = traffic
        num_bytes = sum(sent.values()), sum(received.values())
        return TrainSummary(name, next_step, self.tokens, first, last, *num_bytes, {**sent, **received}, self.phases)


def _trainer(
    plan: FederationPlan,
    segments: ClientSegments,
    silo: Silo,
    trunk: Trunk,
    store: ClientStore,
    recorder: _Recorder,
    options: ClientOptions,
) -> Trainer:
    name = segments.name
    boundary = Boundary(plan.trust.mode)
    held_out = None
    if options.evaluate:
        if any(batch.num_target_tokens for batch in setup.held_out(plan, silo, name)):
            held_out = lambda: list(setup.held_out(plan, silo, name))  # noqa: E731 (a factory, made only if wanted)
        else:
            log.warning("Nothing is held out that could be evaluated: this client trains without evaluation.")
    return Trainer(plan, segments, setup.open_stream(plan, silo, name), trunk, store, boundary, recorder, held_out)


def train(options: ClientOptions, observer: Observer | None = None) -> TrainSummary:
    """Take part in a federation until its run is over.

    Args:
        options: See `ClientOptions`.
        observer: Told of every step and evaluation; if it has `waiting(names)`, `bytes(up, down)` or
            `begin(plan, name)`, these are called too.

    Raises:
        FedseaError: This client cannot take part, or cannot go on; what was applied is durable, and the same call
            goes on from there.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    keeper = IdentityKeeper(options.identity, options.server)
    invitation = asyncio.run(seek_invitation(options.server, keeper.current, options.retry))
    plan, name = invitation.plan, keeper.current().name
    setup.check_limits(plan, name, options)
    log.warning("%s", Boundary(plan.trust.mode).statement)
    checkpoint = setup.open_base_model(plan, options, name)
    silo = setup.open_data(plan, checkpoint, options)
    store = ClientStore(options.run, plan, invitation.run_id)
    recorder = _Recorder(observer)
    try:
        segments = setup.load_segments(plan, checkpoint, name, options.device)
        trunk = RemoteTrunk(
            options.server,
            keeper.current,
            invitation,
            setup.wire_limits(plan, checkpoint, name),
            lambda: store.standing,
            options.retry,
            on_waiting=getattr(observer, "waiting", lambda _: None),
        )
        trainer = _trainer(plan, segments, silo, trunk, store, recorder, options)
        trainer.restore()
        if (begin := getattr(observer, "begin", None)) is not None:
            begin(plan, name, trunk)
        with keeper, trunk:
            trainer.run()
        return recorder.summary(name, store.state.next_step, trunk.traffic)
    finally:
        store.close()


def train_alone(plan_file: Path, name: str, options: ClientOptions, observer: Observer | None = None) -> TrainSummary:
    """Train one client of a plan without a server: the trunk runs in this process.

    Args:
        plan_file: A federation's plan; everybody but `name` is left out, and `wait` does not matter.
        name: The client.
        options: Server and identity are not used.
        observer: As for `train`.

    Raises:
        FedseaError: As for `train`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = load_plan(plan_file)
    training = plan.training.model_copy(update={"mode": "batched", "wait": "all", "min_clients": 1})
    plan = plan.model_copy(update={"clients": (plan.client(name),), "training": training})
    checkpoint = setup.open_base_model(plan, options, name)
    silo = setup.open_data(plan, checkpoint, options)
    store = ClientStore(options.run, plan, run_id="alone")
    recorder = _Recorder(observer)
    try:
        segments = setup.load_segments(plan, checkpoint, name, options.device)
        trunk = LocalTrunk(_load_trunk(plan, checkpoint, name, options.device), plan, name, options.run / "trunk")
        trainer = _trainer(plan, segments, silo, trunk, store, recorder, options)
        trainer.restore()
        if (begin := getattr(observer, "begin", None)) is not None:
            begin(plan, name, None)
        trainer.run()
        return recorder.summary(name, store.state.next_step, ({}, {}))
    finally:
        store.close()


def _load_trunk(plan: FederationPlan, checkpoint: Checkpoint, name: str, device: str) -> Any:
    trunk = load_trunk(
        checkpoint,
        plan.partition_of(name).trunk(checkpoint.num_blocks),
        dtype=getattr(torch, plan.model.dtype),
        device=device,
        activation_checkpointing=plan.model.activation_checkpointing,
        autocast=torch.bfloat16 if plan.model.autocast == "bfloat16" else None,
    )
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    return trunk


def evaluate(options: ClientOptions, everything: bool = False) -> EvalSummary:
    """Loss of the federation's model on this client's data, through the server.

    Args:
        options: With `options.run` holding a checkpoint, its parameters are used; else the base model's segments.
        everything: All rows instead of the held-out split.

    Raises:
        FedseaError: The server cannot be reached, or the data cannot be used.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    keeper = IdentityKeeper(options.identity, options.server)
    invitation = asyncio.run(seek_invitation(options.server, keeper.current, options.retry))
    plan, name = invitation.plan, keeper.current().name
    setup.check_limits(plan, name, options)
    log.warning("%s", Boundary(plan.trust.mode).statement)
    checkpoint = setup.open_base_model(plan, options, name)
    silo = setup.open_data(plan, checkpoint, options)
    segments = setup.load_segments(plan, checkpoint, name, options.device)
    if (found := ClientStore.peek(options.run)) is not None:
        segments.load_tensors(found)
    else:
        log.warning(
            "%s holds no training run: the base model's own segments are used with the server's trunk. Give the run "
            "folder of `fedsea train` with --run.",
            options.run,
        )
    batches = setup.every_row(plan, silo, name) if everything else setup.held_out(plan, silo, name)
    limits = setup.wire_limits(plan, checkpoint, name)
    observing = RemoteTrunk(options.server, keeper.current, invitation, limits, Standing, options.retry, role="observe")
    with observing as trunk:
        loss, tokens = evaluate_batches(segments, trunk, Boundary(plan.trust.mode), batches, plan)
    return EvalSummary(loss, math.exp(min(loss, 700.0)), tokens)


def export_adapter(options: ClientOptions, out: Path, merged: bool = False) -> None:
    """Write the whole model's adapter: this client's part, and the trunk's, fetched from the server.

    Args:
        options: With the run folder of a training run.
        out: Folder to write: a PEFT adapter, or a whole checkpoint.
        merged: Merge into the base weights (which must all be here).

    Raises:
        ConfigError: There is no training run in the folder.
        FedseaError: The server cannot be reached or does not share the trunk.
    """
    keeper = IdentityKeeper(options.identity, options.server)
    invitation = asyncio.run(seek_invitation(options.server, keeper.current, options.retry))
    plan, name = invitation.plan, keeper.current().name
    found = ClientStore.peek(options.run)
    if found is None:
        raise ConfigError(f"{options.run} holds no training run: give the run folder of `fedsea train` with --run.")
    checkpoint = setup.open_base_model(plan, options, name)
    limits = setup.wire_limits(plan, checkpoint, name, trunk=True)
    with RemoteTrunk(
        options.server, keeper.current, invitation, limits, Standing, options.retry, role="observe"
    ) as trunk:
        theirs = trunk.fetch().result()
    prefix = "parameter."
    ours = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    export.write(out, checkpoint, {**theirs, **ours}, plan, merged=merged)
    log.info("wrote %s", out)


def status(server: str, identity: Path) -> dict[str, Any]:
    """How a server stands.

    Raises:
        FedseaError: It cannot be reached or refuses.
    """
    return asyncio.run(call_status(server, Identity.load(identity)))
