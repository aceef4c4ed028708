"""The step under way: opens it, takes its messages, runs its batches, applies it.

A part of the coordinator, which decides when; like it, it runs on the event loop and never blocks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.federation.schedule import place
from fedsea.model.passes import LARGEST_GRADIENT, Entry
from fedsea.server.context import Run
from fedsea.server.engine import Outcome, Pass, TrunkOverflow, at_fault
from fedsea.server.executor.local import Priority
from fedsea.server.replies import Replies
from fedsea.server.rounds import RoundKeeper
from fedsea.server.state import RunState
from fedsea.server.step import ChangedInput, StepState, only_tensor
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_MOST_CHANGES = 2
_TOO_LARGE = (
    "The norm of its gradients that client {name} reported is no number that gradients have (0 to "
    f"{LARGEST_GRADIENT:g}): the step begins again without it. Look for a NaN or an overflow at that client."
)


class Decisions(Protocol):
    """What the step leaves to the coordinator."""

    def advance(self) -> None:
        """Something may start now."""
        ...

    def returning(self) -> tuple[str, ...]:
        """Who is waited for before a step begins."""
        ...

    def evict(self, name: str, error: FedseaError) -> None:
        """This client's values are at fault."""
        ...

    def applied(self, step: StepState, outcome: Outcome) -> None:
        """The step is applied and durable."""
        ...


class StepRunner:
    """Takes one step after the other from its opening to its end.

    Args:
        run: The run.
        rounds: Counts the rounds.
        replies: Makes answers.
        decisions: The coordinator.

    Attributes:
        step: The step under way.
    """

    def __init__(self, run: Run, rounds: RoundKeeper, replies: Replies, decisions: Decisions) -> None:
        self.step: StepState | None = None
        self._run = run
        self._rounds = rounds
        self._replies = replies
        self._decisions = decisions
        self._attempt = 0
        self._changes: Counter[str] = Counter()

    # --- members ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        number = self._run.state.next_step
        members = place(self._run.plan, number).members
        if self._run.wait_s is not None:
            members = tuple(name for name in members if name in self._run.connected)
            if len(members) < self._run.plan.training.min_clients or self._decisions.returning():
                return
        counts = {name: self._run.plan.micro_batches_of(name)[0] for name in members}
        silent = [name for name in members if not self._run.plan.sends_gradients(name)]
        self.step = StepState(number, self._attempt, counts, silent)
        for name in members:
            if name in self._run.connected:
                self._tell_open(self.step, name)

    def welcome(self, name: str, prepared_step: int) -> None:
        """A client is there (again): it goes on with the step, or enters it if nothing of it has run.

        It begins unless it need only say (again) that it is ready: it said where it stands before it read what was
        sent to it, so what it was told on an earlier connection and may not have followed yet still holds.
        """
        step = self.step
        if step is not None and name in step.members:
            if step.finishing:
                return  # the outcome is on its way
            if name in step.told or prepared_step != step.step or not step.has_sent_all(name):
                self._tell_open(step, name)
        elif step is not None:
            step.unheard.discard(name)
            if self._may_still_enter(step, name):
                step.add_member(name, self._run.plan.micro_batches_of(name)[0], self._run.plan.client_names)
                self._tell_open(step, name)

    def _may_still_enter(self, step: StepState, name: str) -> bool:
        members = place(self._run.plan, step.step).members
        return self._run.wait_s is not None and name in members and name not in step.dropped and not step.forwarded

    def _tell_open(self, step: StepState, name: str) -> None:
        step.told.add(name)
        step.members[name].ready = None
        self._run.ports.send(name, m.StepOpen(step.step, step.attempt))

    def leave(self, name: str) -> None:
        """A client's stream has ended; a step that waits for a bounded time goes on without it."""
        step, bounded = self.step, self._run.wait_s is not None
        if step is not None and name in step.members and bounded and step.members[name].ready is None:
            self.drop([name])

    def drop(self, names: Collection[str]) -> None:
        """Go on without these members."""
        step = self.step
        if step is None:
            return
        for name in names:
            log.info("step %d goes on without client %s", step.step, name)
            step.drop(name)
        if not step.members:
            self.restart()

    def restart(self) -> None:
        """Give up the attempt: forget its graphs and gradients, and open the next one."""
        self._attempt += 1
        self.step = None
        self._run.ports.submit(Priority.CONTROL, self._run.engine.reset, lambda _: self._decisions.advance())

    # --- messages ---------------------------------------------------------------------------------------------------

    def receive(self, name: str, message: m.Forward | m.Backward | m.StepReady) -> None:
        """Take a message of a step; one of an attempt that was given up is ignored.

        Raises:
            ProtocolError: It does not fit what the step expects of this client.
        """
        step = self.step
        if step is not None:
            step.unheard.discard(name)
        if isinstance(message, m.StepReady):
            self._ready(name, message)
            return
        if step is None or (message.step, message.attempt) != (step.step, step.attempt) or name not in step.members:
            if message.step > self._run.state.next_step:
                raise ProtocolError(f"Client {name} sent values of step {message.step}, which is not open.")
            return  # of an attempt that was given up: the client has been told, or will be when the next step opens
        if step.finishing:
            raise ProtocolError(f"Client {name} sent values of step {message.step} after it was ready.")
        member = step.members[name]
        try:
            if isinstance(message, m.Forward):
                self._run.check_forward(name, message)
                step.told.discard(name)
                if not step.add_forward(name, message) and message.micro_batch in member.outputs:
                    self._replies.output(name, step, message.micro_batch)
            elif not step.add_backward(name, message) and message.micro_batch in member.propagated:
                self._replies.gradient(name, step, message.micro_batch)
        except ChangedInput:
            log.info("client %s repeated step %d with other values: the step begins again", name, step.step)
            self._changes[name] += 1
            if self._changes[name] > _MOST_CHANGES:
                self._decisions.evict(
                    name, ProtocolError("This client repeats a step with other values again and again.")
                )
            else:
                self.restart()

    def _ready(self, name: str, message: m.StepReady) -> None:
        if self._run.plan.aggregation.sync == "step":
            self._run.check_bundle(name, message.tensors)
        elif message.tensors:
            raise ProtocolError(
                f"Client {name} sent its gradients, which the plan keeps at the clients: install the same version of "
                "fedsea on both sides."
            )
        step, outcome = self.step, self._run.state.outcomes.get(name)
        if outcome is not None and outcome.step == message.step:
            self._replies.done(name, outcome)
        elif step is not None and step.step == message.step and name in step.members:
            member = step.members[name]
            if step.finishing:
                return  # said again; the outcome is on its way
            if name in step.told:
                return  # said before it read that it is to begin: it will, and forget what it prepared
            if not step.has_sent_all(name):
                self._tell_open(step, name)
            elif message.num_target_tokens != sum(f.num_target_tokens for f in member.forwards.values()):
                raise ProtocolError(f"Client {name} reported another number of target tokens than it sent.")
            elif not 0.0 <= message.squared_norm <= LARGEST_GRADIENT**2:  # it would rule the clipping of everybody
                self._decisions.evict(name, NonFiniteError(_TOO_LARGE.format(name=name), name))
            else:
                member.ready = message
        elif message.step >= self._run.state.next_step and step is not None and step.step != message.step:
            raise ProtocolError(f"Client {name} is ready for step {message.step}, which is not open.")

    # --- progress ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything of the step that can start; open the next one if there is none."""
        if self.step is None:
            self._open()
        if self.step is None:
            return
        while (slot := self.step.ready_to_backward()) is not None and ("backward", slot) not in self.step.running:
            self._backward(self.step, slot)
        while (slot := self.step.ready_to_forward()) is not None:
            self._forward(self.step, slot)
        if self.step.complete():
            self._finish(self.step)

    def _entry(self, name: str, message: m.Forward) -> Entry:
        wanted = self._run.plan.trains_below_cut(name)
        return Entry(name, only_tensor(message), message.lengths, message.blocks, wanted)

    def _forward(self, step: StepState, slot: int) -> None:
        entries = [self._entry(name, step.members[name].forwards[slot]) for name in step.in_slot(slot)]
        step.forwarded.add(slot)
        step.running.add(("forward", slot))
        job = self._unless_given_up(step, partial(self._run.engine.passes.forward, step.step, slot, entries))
        self._run.ports.submit(Priority.FORWARD, job, partial(self._forward_done, step, slot))

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
                self._replies.output(name, step, slot)
        self._decisions.advance()

    def _backward(self, step: StepState, slot: int) -> None:
        step.next_backward += 1
        step.running.add(("backward", slot))
        gradients = {
            name: only_tensor(member.gradients[slot])
            for name, member in step.members.items()
            if slot in member.gradients
        }
        job = self._unless_given_up(step, partial(self._run.engine.passes.backward, slot, gradients))
        then = partial(self._backward_done, step, slot, frozenset(gradients))
        self._run.ports.submit(Priority.BACKWARD, job, then)

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
                    self._replies.gradient(name, step, slot)
        self._decisions.advance()

    def _finish(self, step: StepState) -> None:
        step.finishing = True
        ready = [(name, member.ready) for name, member in step.members.items() if member.ready is not None]
        norm = sum(message.squared_norm for _, message in ready)
        gradients = {name: dict(message.tensors) for name, message in ready if isinstance(message.tensors, dict)}
        before = self._run.state

        def job() -> tuple[RunState, Outcome]:
            try:
                outcome = self._run.engine.finish(step.step, step.num_target_tokens, norm, gradients)
            except TrunkOverflow:
                raise at_fault(step.step, self._run.engine.shares(step.step, self._passes(step))) from None
            outcomes = before.outcomes | {name: outcome for name, _ in ready}
            tokens = {name: before.round_tokens.get(name, 0) + message.num_target_tokens for name, message in ready}
            state = replace(
                before,
                next_step=step.step + 1,
                rounds_done=self._rounds.done_after(step.step, before.rounds_done),
                outcomes=outcomes,
                round_tokens=before.round_tokens | tokens,
            )
            self._run.store.save(self._run.engine, state)
            return state, outcome

        self._run.ports.submit(Priority.CONTROL, job, partial(self._finished, step))

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

    def _finished(self, step: StepState, result: tuple[RunState, Outcome]) -> None:
        self._run.state, outcome = result
        self.step, self._attempt = None, 0
        self._changes.clear()
        self._decisions.applied(step, outcome)
