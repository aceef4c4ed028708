"""Decides what happens next: opens steps, forms batches, bounds waiting, closes rounds.

A plain state machine with an injected clock. Messages of clients and results of the engine come in as calls;
what goes out is `send` (a message to a client) and `submit` (a job for the engine thread). It runs on the
server's event loop and never blocks.

A step goes through: opened -> each slot forward -> each slot backward, in order -> every member ready (its own
gradients are durable) -> applied and durable at the server -> `StepDone`. A member that breaks off comes back
with what it has durably, and is told where to go on (`join`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.federation.schedule import place
from fedsea.model.passes import LARGEST_GRADIENT, Entry
from fedsea.plan import FederationPlan
from fedsea.server.engine import Engine, Outcome, Pass, TrunkOverflow, at_fault
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member, Ports
from fedsea.server.replies import Answer, Questions, Replies
from fedsea.server.rounds import RoundKeeper
from fedsea.server.state import RunState, ServerStore
from fedsea.server.step import ChangedInput, StepState, only_tensor
from fedsea.server.waiting import Patience
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_MOST_CHANGES = 2
_TOO_LARGE = (
    "The norm of its gradients that client {name} reported is no number that gradients have (0 to "
    f"{LARGEST_GRADIENT:g}): the step begins again without it. Look for a NaN or an overflow at that client."
)


class Coordinator:
    """The run's state machine.

    Args:
        plan: The resolved plan.
        engine: The trunk; touched only inside submitted jobs.
        store: Where state becomes durable.
        state: Where the run stands.
        roster: What each client of the plan has.
        ports: The world.
    """

    def __init__(
        self,
        plan: FederationPlan,
        engine: Engine,
        store: ServerStore,
        state: RunState,
        roster: Mapping[str, Member],
        ports: Ports,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.store = store
        self.state = state
        self.roster = roster
        self.ports = ports
        self.num_target_tokens = 0
        self.connected: set[str] = set()
        self.step: StepState | None = None
        self.rounds = RoundKeeper(plan, roster)
        self.replies = Replies(ports, roster)
        self.questions = Questions(engine, ports, share_trunk=plan.durability.share_trunk)
        self.failure: FedseaError | None = None
        self._attempt = 0
        self._changes: Counter[str] = Counter()
        self._announced: tuple[str, ...] = ()
        training = plan.training
        self.wait_s = training.wait if training.mode == "batched" and training.wait != "all" else None
        self._patience = Patience(self.wait_s, ports.clock)

    # --- where the run stands ---------------------------------------------------------------------------------------

    @property
    def round_due(self) -> bool:
        """Whether the clients' parameters are to be aggregated before the next step."""
        return self.rounds.due(self.state)

    @property
    def finished(self) -> bool:
        """Whether every step and round is done."""
        return self.state.next_step >= self.plan.num_steps and not self.round_due

    # --- clients come and go ----------------------------------------------------------------------------------------

    def join(self, name: str, join: m.Join) -> None:
        """A client is there (again): tell it what it missed and where to go on.

        Raises:
            ProtocolError: What the client holds and what the server holds do not belong together.
        """
        self.state.check_standing(name, join, strict=self.wait_s is None)
        self.connected.add(name)
        log.info("client %s joined at step %d", name, self.state.next_step)
        outcome = self.state.outcomes.get(name)
        if outcome is not None and outcome.step == join.prepared_step:
            self.replies.done(name, outcome)
        if self.state.result and join.round < self.state.rounds_done:
            self.replies.result(name, self.state)
        if self.finished:
            self.ports.send(name, m.Finished(self.state.next_step))
            return
        if self.round_due:
            self.ports.send(name, m.RoundOpen(self.state.rounds_done))
            return
        step = self.step
        if step is not None and name in step.members:
            step.told.discard(name)
            if join.prepared_step != step.step:
                self._tell_open(step, name)
        elif step is not None and self._may_still_enter(step, name):
            self._enter(step, name)
        self.advance()

    def _may_still_enter(self, step: StepState, name: str) -> bool:
        members = place(self.plan, step.step).members
        return self.wait_s is not None and name in members and name not in step.dropped and not step.forwarded

    def _enter(self, step: StepState, name: str) -> None:
        step.add_member(name, self.plan.micro_batches_of(name)[0], self.plan.client_names)
        self._tell_open(step, name)

    def _tell_open(self, step: StepState, name: str) -> None:
        step.told.add(name)
        self.ports.send(name, m.StepOpen(step.step, step.attempt))

    def leave(self, name: str) -> None:
        """A client's stream has ended."""
        self.connected.discard(name)
        step = self.step
        if step is not None and name in step.members and self.wait_s is not None and step.members[name].ready is None:
            self._drop(step, [name])
        self.advance()

    def evict(self, name: str, error: FedseaError) -> None:
        """End one client's part because of what it sent; begin the step again without its values."""
        log.warning("client %s: %s", name, error)
        self.ports.disconnect(name, error)
        self.connected.discard(name)
        self._restart()

    # --- messages ---------------------------------------------------------------------------------------------------

    def answer(self, name: str, message: m.Message, reply: Answer) -> None:
        """Serve what changes nothing: an evaluation, or the trunk's adapters.

        Raises:
            ProtocolError: The message is something else.
        """
        match message:
            case m.Forward(evaluate=True):
                self._check_forward(name, message)
                self.questions.evaluate(name, message, reply)
            case m.FetchTrunk():
                self.questions.fetch(self.state, reply)
            case _:
                raise ProtocolError(f"A client may not send {type(message).__name__} here.")

    def receive(self, name: str, message: m.Message) -> None:
        """Take a message of a client that trains.

        Raises:
            ProtocolError: It does not fit what the server expects of this client.
        """
        match message:
            case m.Forward(evaluate=False) | m.Backward() | m.StepReady():
                self._step_message(name, message)
            case m.RoundUpdate():
                self._round_update(name, message)
            case _:
                raise ProtocolError(f"A client may not send {type(message).__name__} here.")
        self.advance()

    def _step_message(self, name: str, message: m.Forward | m.Backward | m.StepReady) -> None:
        step = self.step
        if isinstance(message, m.StepReady):
            self._ready(name, message)
            return
        if step is None or (message.step, message.attempt) != (step.step, step.attempt) or name not in step.members:
            if message.step > self.state.next_step:
                raise ProtocolError(f"Client {name} sent values of step {message.step}, which is not open.")
            return  # of an attempt that was given up: the client has been told, or will be when the next step opens
        if step.finishing:
            raise ProtocolError(f"Client {name} sent values of step {message.step} after it was ready.")
        member = step.members[name]
        try:
            if isinstance(message, m.Forward):
                self._check_forward(name, message)
                if not step.add_forward(name, message) and message.micro_batch in member.outputs:
                    self.replies.output(name, step, message.micro_batch)
            elif not step.add_backward(name, message) and message.micro_batch in member.propagated:
                self.replies.gradient(name, step, message.micro_batch)
        except ChangedInput:
            log.info("client %s repeated step %d with other values: the step begins again", name, step.step)
            self._changes[name] += 1
            if self._changes[name] > _MOST_CHANGES:
                self.evict(name, ProtocolError("This client repeats a step with other values again and again."))
            else:
                self._restart()

    def _check_forward(self, name: str, message: m.Forward) -> None:
        """Sizes and shapes were checked on arrival; here, what the plan gives this client."""
        expected = self.roster[name].blocks
        if message.blocks != expected:
            raise ProtocolError(
                f"Client {name} asked for blocks {message.blocks.start}:{message.blocks.stop}; the plan gives it "
                f"{expected.start}:{expected.stop}."
            )
        if max(message.lengths) > self.plan.data.max_tokens:
            raise ProtocolError(
                f"Client {name} sent a sequence of {max(message.lengths)} tokens; the plan's data.max_tokens is "
                f"{self.plan.data.max_tokens}."
            )

    def _check_bundle(self, name: str, tensors: object) -> None:
        """Shapes were checked on arrival; here, that nothing is missing."""
        expected = self.roster[name].shapes.keys()
        if not isinstance(tensors, dict) or tensors.keys() != expected:
            raise ProtocolError(f"Client {name} must send all {len(expected)} of its trained parameters at once.")

    def _ready(self, name: str, message: m.StepReady) -> None:
        if self.plan.aggregation.sync == "step":
            self._check_bundle(name, message.tensors)
        step, outcome = self.step, self.state.outcomes.get(name)
        if outcome is not None and outcome.step == message.step:
            self.replies.done(name, outcome)
        elif step is not None and step.step == message.step and name in step.members:
            member = step.members[name]
            if not step.has_sent_all(name):
                if name not in step.told:  # else it has yet to read that it is to begin: once is enough
                    self._tell_open(step, name)  # the server lost its half: do it again
            elif message.num_target_tokens != sum(f.num_target_tokens for f in member.forwards.values()):
                raise ProtocolError(f"Client {name} reported another number of target tokens than it sent.")
            elif not 0.0 <= message.squared_norm <= LARGEST_GRADIENT**2:  # it would rule the clipping of everybody
                self.evict(name, NonFiniteError(_TOO_LARGE.format(name=name), name))
            else:
                member.ready = message
        elif message.step >= self.state.next_step and step is not None and step.step != message.step:
            raise ProtocolError(f"Client {name} is ready for step {message.step}, which is not open.")

    # --- progress ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start everything that can start."""
        if self.failure is not None or self.finished:
            return
        if self.round_due:
            self._advance_round()
        else:
            self._advance_step()
        self._note_waiting()

    def _advance_step(self) -> None:
        if self.step is None:
            self._open_step()
        if self.step is None:
            return
        while (slot := self.step.ready_to_backward()) is not None and ("backward", slot) not in self.step.running:
            self._run_backward(self.step, slot)
        while (slot := self.step.ready_to_forward()) is not None:
            self._run_forward(self.step, slot)
        if self.step.complete():
            self._finish(self.step)
        self._announce()

    def tick(self) -> None:
        """Called a few times a second: leave stragglers behind when their time is up."""
        if self.wait_s is None or self.failure is not None or self.finished:
            return
        late = self._patience.exhausted()
        if not late:
            return
        if self.round_due:
            self._aggregate()
        elif self.step is not None and not self.step.running and not self.step.finishing:
            self._drop(self.step, late)
            self.advance()

    def _note_waiting(self) -> None:
        """Who has its turn now, and who waits: at every event, whenever ticks fall."""
        if self.round_due:
            missing = self.rounds.missing(self._expected())
            self._patience.note(("round", self.state.rounds_done), missing, self.rounds.updates.keys())
        elif (step := self.step) is not None:
            turn = step.waiting_for()
            others = [name for name in step.members if name not in turn]
            self._patience.note(("step", step.step, step.attempt), turn, others)

    def _announce(self) -> None:
        step = self.step
        waiting = () if step is None else tuple(n for n in step.waiting_for() if n not in self.connected)
        if waiting != self._announced:
            self._announced = waiting
            self._tell(m.Waiting(self.state.next_step, waiting))

    def _tell(self, message: m.Message) -> None:
        """To everybody who is connected."""
        for name in self.connected:
            self.ports.send(name, message)

    def _open_step(self) -> None:
        number = self.state.next_step
        members = place(self.plan, number).members
        if self.wait_s is not None:
            members = tuple(name for name in members if name in self.connected)
            if len(members) < self.plan.training.min_clients:
                return
        counts = {name: self.plan.micro_batches_of(name)[0] for name in members}
        silent = [name for name in members if not self.plan.sends_gradients(name)]
        self.step = StepState(number, self._attempt, counts, silent)
        for name in members:
            if name in self.connected:
                self._tell_open(self.step, name)

    def _restart(self) -> None:
        """Give up the attempt: forget its graphs and gradients, and open the next one."""
        self._attempt += 1
        self.step = None
        self.ports.submit(Priority.CONTROL, self.engine.reset, lambda _: self.advance())

    def _drop(self, step: StepState, names: tuple[str, ...] | list[str]) -> None:
        for name in names:
            log.info("step %d goes on without client %s", step.step, name)
            step.drop(name)
        if not step.members:
            self._restart()

    # --- engine jobs ------------------------------------------------------------------------------------------------

    def _entry(self, name: str, message: m.Forward) -> Entry:
        wanted = self.plan.trains_below_cut(name)
        return Entry(name, only_tensor(message), message.lengths, message.blocks, wanted)

    def _run_forward(self, step: StepState, slot: int) -> None:
        entries = [self._entry(name, step.members[name].forwards[slot]) for name in step.in_slot(slot)]
        step.forwarded.add(slot)
        step.running.add(("forward", slot))
        job = self._unless_given_up(step, partial(self.engine.passes.forward, step.step, slot, entries))
        self.ports.submit(Priority.FORWARD, job, partial(self._forward_done, step, slot))

    def _unless_given_up(self, step: StepState, job: Callable[[], Any]) -> Callable[[], Any]:
        """Jobs of an attempt that was given up must not touch the next one's gradients."""
        return lambda: job() if self.step is step else None

    def _forward_done(self, step: StepState, slot: int, outputs: dict[str, torch.Tensor]) -> None:
        step.running.discard(("forward", slot))
        if step is not self.step:
            return
        for name, output in outputs.items():
            if (member := step.members.get(name)) is not None:
                member.outputs[slot] = output
                self.replies.output(name, step, slot)
        self.advance()

    def _run_backward(self, step: StepState, slot: int) -> None:
        step.next_backward += 1
        step.running.add(("backward", slot))
        gradients = {
            name: only_tensor(member.gradients[slot])
            for name, member in step.members.items()
            if slot in member.gradients
        }
        job = self._unless_given_up(step, partial(self.engine.passes.backward, slot, gradients))
        then = partial(self._backward_done, step, slot, frozenset(gradients))
        self.ports.submit(Priority.BACKWARD, job, then)

    def _backward_done(
        self, step: StepState, slot: int, sent: frozenset[str], results: dict[str, torch.Tensor | None]
    ) -> None:
        step.running.discard(("backward", slot))
        if step is not self.step:
            return
        for name, member in {**step.members, **step.dropped}.items():
            if slot in member.forwards and (name in sent or name in step.silent):
                member.propagated[slot] = results.get(name)
                if name in step.members and name not in step.silent:
                    self.replies.gradient(name, step, slot)
        self.advance()

    def _finish(self, step: StepState) -> None:
        step.finishing = True
        ready = [(name, member.ready) for name, member in step.members.items() if member.ready is not None]
        norm = sum(message.squared_norm for _, message in ready)
        gradients = {name: dict(message.tensors) for name, message in ready if isinstance(message.tensors, dict)}
        before = self.state

        def job() -> tuple[RunState, Outcome]:
            try:
                outcome = self.engine.finish(step.step, step.num_target_tokens, norm, gradients)
            except TrunkOverflow:
                raise at_fault(step.step, self.engine.shares(step.step, self._passes(step))) from None
            outcomes = before.outcomes | {name: outcome for name, _ in ready}
            tokens = {name: before.round_tokens.get(name, 0) + message.num_target_tokens for name, message in ready}
            state = replace(
                before,
                next_step=step.step + 1,
                rounds_done=self.rounds.done_after(step.step, before.rounds_done),
                outcomes=outcomes,
                round_tokens=before.round_tokens | tokens,
            )
            self.store.save(self.engine, state)
            return state, outcome

        self.ports.submit(Priority.CONTROL, job, partial(self._finished_step, step))

    def _passes(self, step: StepState) -> dict[str, list[Pass]]:
        """Everything that the step's gradient is made of, by client."""
        return {
            name: [
                (slot, self._entry(name, member.forwards[slot]), only_tensor(member.gradients[slot]))
                for slot in member.propagated
                if slot in member.gradients
            ]
            for name, member in {**step.members, **step.dropped}.items()
            if member.propagated
        }

    def _finished_step(self, step: StepState, result: tuple[RunState, Outcome]) -> None:
        self.state, outcome = result
        self.num_target_tokens += outcome.num_target_tokens
        self.step, self._attempt = None, 0
        self._changes.clear()
        for name in step.members:
            if name in self.connected:
                self.replies.done(name, outcome)
        if self.round_due:
            self._tell(m.RoundOpen(self.state.rounds_done))
        elif self.finished:
            self._tell(m.Finished(self.state.next_step))
        self.advance()

    def engine_failed(self, error: BaseException) -> None:
        """An engine job raised: a client's values were at fault, or the run cannot go on."""
        if isinstance(error, NonFiniteError) and error.client:
            self.evict(error.client, error)
            self.advance()
            return
        if not isinstance(error, FedseaError):
            log.error("the engine failed", exc_info=error)
        self.failure = error if isinstance(error, FedseaError) else FedseaError("The server failed; see its log.")
        for name in tuple(self.connected):
            self.ports.disconnect(name, self.failure)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _round_update(self, name: str, message: m.RoundUpdate) -> None:
        self._check_bundle(name, message.tensors)
        if message.round < self.state.rounds_done:
            self.replies.result(name, self.state)
        else:
            self.rounds.add(name, message, self.state, strict=self.wait_s is None)

    def _advance_round(self) -> None:
        if self.rounds.complete(self._expected()):
            self._aggregate()

    def _expected(self) -> tuple[str, ...]:
        """Whose parameters a round is made of: everybody's, or with bounded waiting, of those who trained in it."""
        if self.wait_s is None:
            return self.plan.client_names
        first = self.state.rounds_done * self.plan.training.steps_per_round
        return tuple(name for name, outcome in self.state.outcomes.items() if outcome.step >= first)

    def _aggregate(self) -> None:
        if self.rounds.aggregating:
            return
        self.rounds.aggregating = True
        updates, before = dict(self.rounds.updates), self.state

        def job() -> RunState:
            result = self.engine.average(updates)
            state = replace(before, result=result, rounds_done=before.rounds_done + 1, round_tokens={})
            self.store.save_round(self.engine, state)
            return state

        self.ports.submit(Priority.CONTROL, job, self._aggregated)

    def _aggregated(self, state: RunState) -> None:
        self.state = state
        self.rounds.aggregating = False
        self.rounds.updates.clear()
        for name in self.connected:
            self.replies.result(name, self.state)
        if self.finished:
            self._tell(m.Finished(self.state.next_step))
        self.advance()
