"""The client's training loop: follows the trunk's events, keeps several micro-batches in flight."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedsea.client.evaluation import evaluate
from fedsea.client.releases import ReleaseNote, Releases
from fedsea.client.secure import SecureRounds
from fedsea.client.segments import ClientSegments
from fedsea.client.state import ClientState, ClientStore, Prepared
from fedsea.client.trunk import Connected, MicroBatch, StepInterrupted, Trunk
from fedsea.data.batches import BatchStream
from fedsea.errors import FedseaError, ProtocolError, StorageError
from fedsea.federation.schedule import place
from fedsea.plan import FederationPlan
from fedsea.plan.trust import needs_norms
from fedsea.privacy.boundary import Boundary, Maskable
from fedsea.types import TokenBatch
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_KNOWN = "known."
"""Names in a checkpoint of what the server knows of the parameters begin so."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One applied step, for displays and metrics; stays at the client.

    Attributes:
        mean_loss: Nats per target token, before the step.
        seconds: Phase to wall seconds: "input", "trunk" (waiting for it; its work, where it runs in this process),
            "output", "commit".
    """

    step: int
    round: int
    num_steps: int
    mean_loss: float
    num_target_tokens: int
    num_tokens: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Loss on the held-out split after `next_step` steps."""

    next_step: int
    mean_loss: float
    num_target_tokens: int


class Observer(Protocol):
    """Who watches a training run."""

    def step(self, report: StepReport) -> None:
        """A step was applied."""
        ...

    def evaluation(self, report: EvaluationReport) -> None:
        """The held-out split was evaluated."""
        ...


@dataclass(slots=True)
class _Work:
    """One step under way at this client: its micro-batches."""

    batches: list[TokenBatch]
    data_after: dict[str, int]


class Trainer:
    """Trains one client's segments with a trunk.

    Args:
        plan: The federation's plan.
        segments: This client's segments; restored from `store` if it holds a checkpoint.
        stream: Training batches.
        trunk: Local or remote.
        store: Durable state.
        boundary: The only maker of releases.
        observer: Told of every step and evaluation.
        held_out: Makes the evaluation batches anew; None evaluates nothing.
        secure: This client's part in secure aggregation; None where the plan has none.
    """

    def __init__(
        self,
        plan: FederationPlan,
        segments: ClientSegments,
        stream: BatchStream,
        trunk: Trunk,
        store: ClientStore,
        boundary: Boundary,
        observer: Observer,
        held_out: Callable[[], list[TokenBatch]] | None = None,
        secure: SecureRounds | None = None,
    ) -> None:
        self.plan = plan
        self.segments = segments
        self.stream = stream
        self.trunk = trunk
        self.store = store
        self.boundary = boundary
        self.observer = observer
        self.held_out = held_out
        self.secure = secure
        self._work: _Work | None = None
        self._seconds: dict[str, float] = {}
        self._evaluated_at = -1
        self._releases = Releases(trunk, boundary, ReleaseNote(store.folder / "releases.json"))
        self._reference: dict[str, torch.Tensor] = {}  # what the server knows of the parameters; only if noise needs it

    def restore(self) -> None:
        """Take over the newest checkpoint, or write the first one."""
        tensors = self.store.restore()
        noise = self.boundary.noise
        keeps = self.plan.aggregation.sync == "round" and noise is not None and noise.update_std > 0
        if tensors is None:
            self._reference = self.segments.parameters() if keeps else {}
            self.store.save(ClientState(data=self.stream.state()), self._tensors())
        else:
            self.segments.load_tensors(tensors)
            self.stream.restore(self.store.state.data)
            known = {n.removeprefix(_KNOWN): t.clone() for n, t in tensors.items() if n.startswith(_KNOWN)}
            self._reference = known if keeps else {}
            self._releases.resume(self.store.state.updates)
            if next_step := self.store.state.next_step:
                log.info("going on after step %d of %d", next_step, self.plan.num_steps)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.segments.tensors() | {f"{_KNOWN}{name}": tensor for name, tensor in self._reference.items()}

    def run(self) -> None:
        """Train to the end of the run.

        Raises:
            FedseaError: The run cannot go on; what was applied is durable. Its cause is a `StorageError` if the last
                checkpoint is not.
        """
        try:
            self._follow()
        except BaseException as error:
            if isinstance(error, FedseaError):
                self.trunk.abandon(self.store.state.next_step, error)
            self._settle(error)
            raise

    def _settle(self, error: BaseException) -> None:
        """Wait for the checkpoint that is being written; a disk that refused it is not to be forgotten over `error`."""
        try:
            self.store.flush()
        except StorageError as lost:
            log.error("%s The last checkpoint in %s is the one before.", lost.message, self.store.folder)
            raise error from lost

    def _follow(self) -> None:
        while True:
            event = self.trunk.next_event()
            match event:
                case Connected():
                    if self.secure is not None:
                        self.secure.forget()
                    self._offer_prepared()
                case m.StepOpen():
                    if self.secure is not None:
                        self.secure.open_step(self.store.state.rounds_done)
                    self._evaluate_once()
                    try:
                        self._step(event)
                    except StepInterrupted:
                        continue
                case m.StepDone():
                    self._apply(event)
                case m.RoundOpen() if self.secure is not None:
                    state = self.store.state
                    self.secure.begin(event, state.rounds_done, state.round_tokens, self._maskable)
                case m.SecureRoster() | m.SecureDelivery() | m.SecureSurvivors() | m.SecureEvidence():
                    if self.secure is None:
                        raise ProtocolError("The server began secure aggregation, which is not in the plan.")
                    self.secure.receive(event)
                case m.RoundOpen():
                    parameters = self.segments.parameters()
                    sealed = self._releases.update(("round", event.round), parameters, self._reference)
                    self.trunk.update(event.round, self.store.state.round_tokens, sealed)
                case m.RoundResult():
                    self._take_round(event)
                case m.Finished():
                    self._evaluate_once(always=True)
                    self.store.flush()
                    self.trunk.close(self.store.state.next_step)
                    return

    # --- one step ---------------------------------------------------------------------------------------------------

    def _begin(self) -> _Work:
        """The micro-batches of the next update; the same ones if the step is begun again."""
        if self._work is None:
            self._releases.begin(self.store.state.updates)
            self.stream.restore(self.store.state.data)
            count, _ = self.plan.micro_batches_of(self.segments.name)
            batches = [self.stream.next() for _ in range(count)]
            self._work = _Work(batches, dict(self.stream.state()))
        return self._work

    def _step(self, opened: m.StepOpen) -> None:
        work = self._begin()
        if self.store.prepared is not None:
            self.store.discard_prepared()
        self._seconds = {"input": 0.0, "trunk": 0.0, "output": 0.0, "commit": 0.0}
        self.segments.zero_grad()
        self.segments.train(True)
        loss = self._micro_batches(opened, work)
        self._prepare(opened, work, loss)

    def _where(self, opened: m.StepOpen, work: _Work, number: int) -> MicroBatch:
        batch = work.batches[number]
        count = len(work.batches)
        tokens = batch.num_target_tokens
        return MicroBatch(opened.step, opened.attempt, number, count, batch.lengths, tokens, self.segments.trunk_blocks)

    def _micro_batches(self, opened: m.StepOpen, work: _Work) -> float:
        """Forward and backward of all micro-batches, up to `in_flight` of them under way at once.

        Outputs and input gradients are taken in order, so that gradients are summed in the same order in every run.
        """
        update, count = self.store.state.updates, len(work.batches)
        outputs: deque[Future[torch.Tensor]] = deque()
        returned: deque[tuple[torch.Tensor, Future[torch.Tensor | None]]] = deque()
        hidden: dict[int, torch.Tensor] = {}
        total = 0.0

        def launch(number: int) -> None:
            with self._timed("input"):
                hidden[number] = self.segments.embed(work.batches[number], update, number)
                sealed = self._releases.hidden(number, work.batches[number], hidden[number])
            with self._timed("trunk"):  # one in this process does its work in the call
                outputs.append(self.trunk.forward(self._where(opened, work, number), sealed))

        for number in range(min(self.plan.training.in_flight, count)):
            launch(number)
        for number in range(count):
            with self._timed("trunk"):
                output = outputs.popleft().result()
            with self._timed("output"):
                loss, gradient = self.segments.head(work.batches[number], output, update, number)
            total += loss
            embedded = hidden.pop(number)
            if gradient is not None:
                sealed = self._releases.gradient(number, work.batches[number], output, gradient)
                with self._timed("trunk"):
                    answer = self.trunk.backward(self._where(opened, work, number), sealed)
                if self.segments.trains_input:
                    returned.append((embedded, answer))
            while returned and returned[0][1].done():
                self._backward_input(*returned.popleft())
            if number + len(outputs) + 1 < count:
                launch(number + len(outputs) + 1)
        while returned:
            self._backward_input(*returned.popleft())
        return total

    def _backward_input(self, hidden_TH: torch.Tensor, answer: Future[torch.Tensor | None]) -> None:
        with self._timed("trunk"):
            gradient = answer.result()
        if gradient is None:
            raise ProtocolError("The server sent no gradient for the input segment, which the plan trains.")
        with self._timed("input"):
            torch.autograd.backward(hidden_TH, gradient.to(hidden_TH))

    def _prepare(self, opened: m.StepOpen, work: _Work, loss: float) -> None:
        tokens = sum(batch.num_target_tokens for batch in work.batches)
        with self._timed("commit"):
            norm = self.segments.squared_norm(1.0 / tokens)
            gradients, updates = self.segments.gradients(), self.store.state.updates
            self.store.prepare(Prepared(opened.step, tokens, norm, loss / tokens, work.data_after, gradients, updates))
            self._offer_prepared(opened.attempt)

    def _offer_prepared(self, attempt: int = 0) -> None:
        prepared = self.store.prepared
        if prepared is None:
            return
        sums = prepared.gradients if self.plan.aggregation.sync == "step" else {}
        sealed = self._releases.update(("step", prepared.step), sums, {})
        norm = prepared.squared_norm if needs_norms(self.plan) else 0.0
        self.trunk.ready(prepared.step, attempt, prepared.num_target_tokens, norm, sealed)

    def _maskable(self) -> Maskable:
        self.store.flush()  # else a kill could leave the weight of these parameters with others
        return self._releases.maskable(self.segments.parameters(), self._reference)

    def _apply(self, done: m.StepDone) -> None:
        prepared, state = self.store.prepared, self.store.state
        if done.step < state.next_step:
            return  # told twice
        if prepared is None or prepared.step != done.step:
            raise ProtocolError(
                f"The server applied step {done.step} with this client's part, of which this run folder knows nothing: "
                "the folder is older than the run. Restore the newest run folder at this client."
            )
        if self.secure is not None:
            self.secure.forget()  # an attempt that was begun before has the weight without this step
        with self._timed("commit"):
            if self.plan.aggregation.sync == "step":
                gradients, scale = dict(done.tensors), 1.0 / done.num_target_tokens  # type: ignore[arg-type]
            else:
                gradients, scale = dict(prepared.gradients), 1.0 / prepared.num_target_tokens
            self.segments.apply(gradients, done.step, scale, done.clip_coefficient)
            self.stream.restore(prepared.data)
            after = replace(
                state,
                next_step=done.step + 1,
                updates=state.updates + 1,
                round_tokens=state.round_tokens + prepared.num_target_tokens,
                data=prepared.data,
            )
            self.store.save(after, self._tensors())
        num_tokens = sum(batch.num_tokens for batch in self._work.batches) if self._work else 0
        self._work = None
        self._releases.forget()
        report = StepReport(
            done.step,
            place(self.plan, done.step).round,
            self.plan.num_steps,
            prepared.mean_loss,
            prepared.num_target_tokens,
            num_tokens,
            dict(self._seconds),
        )
        self.observer.step(report)

    # --- rounds and evaluation --------------------------------------------------------------------------------------

    def _take_round(self, result: m.RoundResult) -> None:
        if result.round < self.store.state.rounds_done:
            return
        if self.secure is not None:
            self.secure.close_round(result, self.store.state.rounds_done)
        if self.plan.aggregation.sync == "round":
            # A round that nobody with this partition took part in says nothing of some parameters: they stay.
            self.segments.load_parameters(self.segments.parameters() | dict(result.tensors))  # type: ignore[arg-type]
            if self._reference:
                self._reference |= dict(result.tensors)  # type: ignore[arg-type]
            self._releases.forget()
        state = replace(self.store.state, rounds_done=result.round + 1, round_tokens=0)
        self.store.save(state, self._tensors())
        self._evaluate_once(always=True)

    def _evaluate_once(self, *, always: bool = False) -> None:
        """Evaluate before the first step, after every round, and at the end."""
        step = self.store.state.next_step
        due = step == 0 or place(self.plan, step - 1).ends_round
        if self.held_out is None or self._evaluated_at == step or not (due or always):
            return
        self._evaluated_at = step
        self.segments.train(False)
        loss, tokens = evaluate(self.segments, self.trunk, self.boundary, self.held_out(), self.plan)
        self.observer.evaluation(EvaluationReport(step, loss, tokens))

    def _timed(self, phase: str) -> _Timer:
        return _Timer(self._seconds, phase)


class _Timer:
    """Adds the seconds of a `with` block to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds = seconds
        self._phase = phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.perf_counter() - self._start
