"""Training, as a data owner starts it: with a server, or alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fedsea.client import setup
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.pseudonyms import note_training
from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.run_key import ALONE, RunKey
from fedsea.client.secure import SecureRounds, layout_of
from fedsea.client.segments import ClientSegments
from fedsea.client.setup import ClientOptions, Invited
from fedsea.client.state import ClientStore, DataNote, Ended
from fedsea.client.trainer import EvaluationReport, Observer, StepReport, Trainer
from fedsea.client.trunk import Connected, Trunk
from fedsea.data.opening import files_sha256
from fedsea.data.silo import Silo
from fedsea.errors import ConfigError, FedseaError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.fingerprint import fingerprint
from fedsea.model.loading import trainable_trunk
from fedsea.plan import FederationPlan, load_plan
from fedsea.privacy.boundary import Boundary
from fedsea.wire import messages as m
from fedsea.wire.identity.identity import Identity
from fedsea.wire.identity.signing import IdentityNotary
from fedsea.wire.limits import HANDSHAKE

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
        step_before: Steps that were applied when `loss_before` was taken, by earlier processes.
        claim: What may be claimed of all releases so far, or why nothing can be, as a sentence.
        finished_before: The run was finished already: nothing was trained now, and the rest is of the process that did.
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
    finished_before: bool = False
    claim: str = ""
    step_before: int = 0


class _Recorder:
    """Passes reports on, and keeps what the summary needs."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self.losses: list[float] = []
        self.step_before = 0
        self.tokens = 0
        self.phases: dict[str, float] = {}

    def step(self, report: StepReport) -> None:
        self.tokens += report.num_target_tokens
        for phase, seconds in report.seconds.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        if self._observer is not None:
            self._observer.step(report)

    def evaluation(self, report: EvaluationReport) -> None:
        if not self.losses:
            self.step_before = report.next_step
        self.losses.append(report.mean_loss)
        if self._observer is not None:
            self._observer.evaluation(report)

    def summary(self, name: str, next_step: int, traffic: tuple[Mapping[str, int], Mapping[str, int]]) -> TrainSummary:
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        sent, received = traffic
        num_bytes = sum(sent.values()), sum(received.values())
        return TrainSummary(
            name,
            next_step,
            self.tokens,
            first,
            last,
            *num_bytes,
            {**sent, **received},
            self.phases,
            step_before=self.step_before,
        )


def _trainer(
    plan: FederationPlan,
    segments: ClientSegments,
    silo: Silo,
    trunk: Trunk,
    store: ClientStore,
    recorder: _Recorder,
    options: ClientOptions,
    boundary: Boundary,
    secure: SecureRounds | None = None,
) -> Trainer:
    name = segments.name
    held_out = None
    if options.evaluate:
        if any(batch.num_target_tokens for batch in setup.held_out(plan, silo, name)):
            held_out = lambda: list(setup.held_out(plan, silo, name))  # noqa: E731 (a factory, made only if wanted)
        else:
            log.warning("Nothing is held out that could be evaluated: this client trains without evaluation.")
    stream = setup.open_stream(plan, silo, name)
    note_training(options.run, options.settings)
    return Trainer(plan, segments, stream, trunk, store, boundary, recorder, held_out, secure)


def train(options: ClientOptions, observer: Observer | None = None) -> TrainSummary:
    """Take part in a federation until its run is over.

    Args:
        options: See `ClientOptions`.
        observer: Told of every step and evaluation; if it has `loading(what)`, `waiting(names)`, `bytes(up, down)`
            or `begin(plan, name)`, these are called too.

    Raises:
        FedseaError: This client cannot take part, or cannot go on; what was applied is durable, and the same call
            goes on from there.
    """
    ended, tell = _ended(options.run), getattr(observer, "loading", setup.unsaid)
    try:
        tell(setup.reaching(options))
        invited = setup.accept(options if ended is None else replace(options, retry_for_s=0.0))
    except FedseaError as error:
        if ended is None or ended.run_id == ALONE or not error.retryable or ended.client != _name_of(options):
            raise
        _check_files(options, ended)
        log.warning("The run in %s is finished, and %s cannot be asked for another one.", options.run, options.server)
        return _as_before(ended)
    plan, name = invited.plan, invited.name
    if ended is not None and ended.belongs_to(invited.key):
        _check_files(options, ended)
        if options.model is not None:
            setup.open_base_model(plan, options, name)
        if _finished_there_too(options, invited, ended):
            log.info("this run is finished (%d steps)", ended.standing.next_step)
            return _as_before(ended)
    tell(setup.CHECKING)
    checkpoint = setup.open_base_model(plan, options, name)
    tell(setup.READING)
    silo = setup.open_data(plan, checkpoint, options, name)
    store = _open_store(options, plan, invited.invitation.run_id, name, silo)
    recorder = _Recorder(observer)
    try:
        store.check()
        tell(setup.LOADING)
        segments = setup.load_segments(plan, checkpoint, name, options.device)
        trunk = RemoteTrunk(
            options.server,
            invited.keeper.current,
            invited.invitation,
            setup.wire_limits(plan, checkpoint, name),
            lambda: store.standing,
            options.retry,
            on_waiting=getattr(observer, "waiting", lambda _: None),
        )
        with setup.open_boundary(plan, name, invited.invitation.run_id, options, own_run=True) as boundary:
            secure = _secure(options, invited, checkpoint, trunk)
            trainer = _trainer(plan, segments, silo, trunk, store, recorder, options, boundary, secure)
            trainer.restore()
            if (begin := getattr(observer, "begin", None)) is not None:
                begin(plan, name, trunk)
            with invited.keeper, trunk:
                trainer.run()
        return _finished(store, recorder.summary(name, store.state.next_step, trunk.traffic), boundary)
    finally:
        store.close()


def _open_store(options: ClientOptions, plan: FederationPlan, run_id: str, name: str, silo: Silo) -> ClientStore:
    note = DataNote.of(options.data, silo)
    return ClientStore(options.run, plan, run_id, name, options.data_format, note)


def _secure(options: ClientOptions, invited: Invited, checkpoint: Checkpoint, trunk: Trunk) -> SecureRounds | None:
    """This client's part in secure aggregation, if the plan has it."""
    if not invited.plan.aggregation.secure:
        return None
    log.info("secure aggregation: the server learns the sum of the clients' parameters, and none of them alone")
    layout, run_id = layout_of(invited.plan, checkpoint), invited.invitation.run_id
    current = invited.keeper.current
    return SecureRounds(
        invited.plan, invited.name, run_id, layout, lambda: IdentityNotary(current()), trunk, options.run
    )


def _finished_there_too(options: ClientOptions, invited: Invited, ended: Ended) -> bool:
    """Say goodbye again, for the server may be a new process that waits for it; False if its run is not finished."""
    current, standing = invited.keeper.current, ended.standing
    with RemoteTrunk(options.server, current, invited.invitation, HANDSHAKE, lambda: standing, options.retry) as trunk:
        while isinstance(event := trunk.next_event(), Connected):
            pass
        if not isinstance(event, m.Finished):
            return False
        trunk.close(standing.next_step)
    return True


def _finished(store: ClientStore, summary: TrainSummary, boundary: Boundary) -> TrainSummary:
    summary = replace(summary, claim=boundary.claim().sentence())
    store.finish(asdict(summary))
    return summary


def _check_files(options: ClientOptions, ended: Ended) -> None:
    """Refuse to answer for a finished run when other files are given; no files ask how it ended."""
    if options.data and ended.data_sha256 and files_sha256(options.data) != ended.data_sha256:
        raise ConfigError(
            f"The run in {options.run} is finished, and these files are not those of the finished run. To train on "
            "them, give --run a new folder; to see how that run ended, give its files again."
        )


def _ended(run: Path) -> Ended | None:
    """How the run in a folder ended; None if it did not, or if the note of it is of another version."""
    ended = ClientStore.ended(run)
    try:
        return ended if ended is None or _as_before(ended) else None
    except TypeError:
        return None


def _name_of(options: ClientOptions) -> str:
    return Identity.load(options.identity).name


def _as_before(ended: Ended) -> TrainSummary:
    return TrainSummary(**{**ended.summary, "finished_before": True})


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
    plan, tell = load_plan(plan_file).alone(name), getattr(observer, "loading", setup.unsaid)
    tell(setup.CHECKING)
    checkpoint = setup.open_base_model(plan, options, name)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": fingerprint(checkpoint)})})
    ended = _ended(options.run)
    if ended is not None and ended.belongs_to(RunKey(plan, ALONE, name)):
        _check_files(options, ended)
        log.info("this run is finished (%d steps)", ended.standing.next_step)
        return _as_before(ended)
    tell(setup.READING)
    silo = setup.open_data(plan, checkpoint, options, name)
    store = _open_store(options, plan, ALONE, name, silo)
    recorder = _Recorder(observer)
    try:
        store.check()  # before the trunk, whose tensors may have other shapes
        tell(setup.LOADING_ALL)
        segments = setup.load_segments(plan, checkpoint, name, options.device)
        blocks = plan.partition_of(name).trunk(checkpoint.num_blocks)
        segment = trainable_trunk(plan, checkpoint, blocks, options.device)
        trunk = LocalTrunk(segment, plan, name, options.run / "trunk")
        with trunk, setup.open_boundary(plan, name, ALONE, options) as boundary:
            if boundary.noise is not None:
                log.warning("%s (This client trains alone: nothing leaves this machine.)", boundary.statement)
            trainer = _trainer(plan, segments, silo, trunk, store, recorder, options, boundary)
            trainer.restore()
            trunk.check_standing(store.standing)
            if (begin := getattr(observer, "begin", None)) is not None:
                begin(plan, name, None)
            trainer.run()
        return _finished(store, recorder.summary(name, store.state.next_step, ({}, {})), boundary)
    finally:
        store.close()
