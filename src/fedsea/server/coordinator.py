"""Decides what happens next: who is there, when a step may go on, whom others wait for, when a round is closed.

A plain state machine with an injected clock. Messages of clients and results of the engine come in as calls;
what goes out is `send` (a message to a client) and `submit` (a job for the engine thread). It runs on the
server's event loop and never blocks.

A step goes through: opened -> each slot forward -> each slot backward, in order -> every member ready (its own
gradients are durable) -> applied and durable at the server -> `StepDone`; that is `steps`. A member that breaks off
comes back with what it has durably, and is told where to go on (`join`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.federation.secure import Verifier
from fedsea.plan import FederationPlan
from fedsea.server.context import Run
from fedsea.server.engine import Engine, Outcome
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member, Ports
from fedsea.server.replies import Answer, Questions, Replies
from fedsea.server.rounds import RoundKeeper
from fedsea.server.secure import SecureRounds
from fedsea.server.state import RunState, ServerStore
from fedsea.server.step import StepState
from fedsea.server.steps import StepRunner
from fedsea.server.waiting import Patience, Returning
from fedsea.wire import messages as m

log = logging.getLogger(__name__)


class Coordinator:
    """The run's state machine.

    Args:
        plan: The resolved plan.
        engine: The trunk; touched only inside submitted jobs.
        store: Where state becomes durable.
        state: Where the run stands.
        roster: What each client of the plan has.
        ports: The world.
        verifier: Checks clients' certificates; needed with `aggregation.secure`.

    Raises:
        ConfigError: Secure aggregation cannot be done with this plan.
    """

    def __init__(
        self,
        plan: FederationPlan,
        engine: Engine,
        store: ServerStore,
        state: RunState,
        roster: Mapping[str, Member],
        ports: Ports,
        verifier: Verifier | None = None,
    ) -> None:
        self.run = Run(plan, engine, store, state, roster, ports)
        self.secure: SecureRounds | None = None
        if plan.aggregation.secure:
            assert verifier is not None
            self.secure = SecureRounds(self.run, self, verifier)
        self.num_target_tokens = 0
        self.failure: FedseaError | None = None
        self.replies = Replies(ports, roster)
        self.rounds = RoundKeeper(plan, roster)
        self.steps = StepRunner(self.run, self.rounds, self.replies, self)
        self.questions = Questions(engine, ports, share_trunk=plan.durability.share_trunk)
        self.wait_s = self.run.wait_s
        self._patience = Patience(self.wait_s, ports.clock)
        self._returning = Returning(plan.client_names, ports.clock)
        self._announced: tuple[str, ...] = ()
        self._evaluating: Counter[str] = Counter()

    # --- where the run stands ---------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """What must not be forgotten."""
        return self.run.state

    @property
    def connected(self) -> set[str]:
        """Clients that train and are there."""
        return self.run.connected

    @property
    def step(self) -> StepState | None:
        """The step under way."""
        return self.steps.step

    @property
    def round_due(self) -> bool:
        """Whether the clients' parameters are to be aggregated before the next step."""
        return self.rounds.due(self.state)

    @property
    def finished(self) -> bool:
        """Whether every step and round is done."""
        return self.state.next_step >= self.run.plan.num_steps and not self.round_due

    # --- clients come and go ----------------------------------------------------------------------------------------

    def join(self, name: str, join: m.Join) -> None:
        """A client is there (again): tell it what it missed and where to go on.

        Raises:
            ProtocolError: What the client holds and what the server holds do not belong together.
        """
        self.state.check_standing(name, join, strict=self.wait_s is None)
        self.connected.add(name)
        self._returning.here(name)
        log.info("client %s joined at step %d", name, self.state.next_step)
        outcome = self.state.outcomes.get(name)
        if outcome is not None and outcome.step == join.prepared_step:
            self.replies.done(name, outcome)
        if (self.state.result or self.state.skipped) and join.round < self.state.rounds_done:
            self.replies.result(name, self.state)
        if self.finished:
            self.run.ports.send(name, m.Finished(self.state.next_step))
            return
        if self.round_due and self.secure is not None:
            self.secure.join(name)
        elif self.round_due:
            self.run.ports.send(name, m.RoundOpen(self.state.rounds_done))
        else:
            self.steps.welcome(name, join.prepared_step)
        self.advance()

    def leave(self, name: str) -> None:
        """A client's stream has ended."""
        self.connected.discard(name)
        self.steps.leave(name)
        if self.secure is not None:
            self.secure.leave(name)
        self.advance()

    def evict(self, name: str, error: FedseaError) -> None:
        """End one client's part because of what it sent; begin the step again without its values."""
        log.warning("client %s: %s", name, error)
        self.run.ports.disconnect(name, error)
        self.connected.discard(name)
        self.steps.restart()

    # --- messages ---------------------------------------------------------------------------------------------------

    def answer(self, name: str, message: m.Message, reply: Answer, *, trains: bool = False) -> None:
        """Serve what changes nothing: an evaluation, its gradient, or the trunk's adapters.

        Args:
            name: The client.
            message: What it asks.
            reply: Takes the answer.
            trains: Whether it asks in the middle of its training, where others may wait for it.

        Raises:
            ProtocolError: The message is something else.
        """
        match message:
            case m.Forward(evaluate=True):
                self.run.check_forward(name, message)
                self.questions.evaluate(name, message, partial(self._evaluated, name, reply) if trains else reply)
                if trains:
                    self._evaluating[name] += 1
                    self._note_waiting()
            case m.Pullback():
                self.run.check_forward(name, message)
                self.questions.pull_back(name, message, reply)
            case m.FetchTrunk():
                self.questions.fetch(self.state, reply)
            case _:
                raise ProtocolError(f"A client may not send {type(message).__name__} here.")

    def _evaluated(self, name: str, reply: Answer, answer: m.Message) -> None:
        self._evaluating[name] -= 1  # first: it is over, whatever becomes of the answer
        self._note_waiting()
        reply(answer)

    def receive(self, name: str, message: m.Message) -> None:
        """Take a message of a client that trains.

        Raises:
            ProtocolError: It does not fit what the server expects of this client.
        """
        match message:
            case m.Forward(evaluate=False) | m.Backward() | m.StepReady():
                self.steps.receive(name, message)
            case m.RoundUpdate() if self.secure is None:
                self._round_update(name, message)
            case m.SecureKeys() | m.SecureShares() | m.SecureUpdate() | m.SecureConsent() | m.SecureReveal() if (
                self.secure is not None
            ):
                self.secure.receive(name, message)
            case _:
                raise ProtocolError(f"A client may not send {type(message).__name__} here.")
        self.advance()

    # --- progress ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start everything that can start."""
        if self.failure is not None:
            return
        if self.round_due:
            self._advance_round()
        elif not self.finished:
            self.steps.start()
        self._announce()
        self._note_waiting()

    def waiting_for(self) -> tuple[str, ...]:
        """Clients whose turn it is to send something that the step, or the round's end, needs next."""
        if self.round_due and self.secure is not None:
            return self.secure.waiting_for()
        if self.round_due:
            return self.rounds.missing(self.expected())
        return self.returning() if self.step is None else self.step.waiting_for()

    def returning(self) -> tuple[str, ...]:
        """Who trained before this server was started again and may be seeking it still, where others would go on."""
        return () if self.wait_s is None or self.finished else self._returning.among(self.state.outcomes)

    def tick(self) -> None:
        """Called a few times a second: leave stragglers behind when their time is up."""
        if self.wait_s is None or self.failure is not None or self.finished:
            return
        if self.step is None and not self.round_due:
            self.advance()  # who was to return may be too late by now
        late = self._patience.exhausted()
        if not late or (self.round_due and self._returning.among(late)):
            return  # a round without those who seek this server still would leave out what they trained
        if self.round_due and self.secure is not None:
            self.secure.late(late)
            self.advance()
        elif self.round_due:
            self._aggregate()
        elif self.step is not None and not self.step.running and not self.step.finishing:
            self.steps.drop(late)
            self.advance()

    def _note_waiting(self) -> None:
        """Who has its turn now, and who waits: at every event, whenever ticks fall."""
        step, turn = self.step, self.waiting_for()
        if self.round_due and self.secure is not None:
            self._patience.note(self.secure.stage(), turn, self.secure.arrived())
        elif self.round_due:
            self._patience.note(("round", self.state.rounds_done), turn, self.rounds.updates.keys())
        elif step is not None:
            # Who is there without a part in the step waits for its end. One that was left behind and is silent may
            # hang: it must not make the step end for those who work on.
            others = self.connected.union(step.members).difference(turn, step.unheard)
            served = [name for name, count in self._evaluating.items() if count]
            self._patience.note(("step", step.step, step.attempt), turn, others, served)

    def _announce(self) -> None:
        waiting = tuple(name for name in self.waiting_for() if name not in self.connected)
        if waiting != self._announced:
            self._announced = waiting
            self._tell(m.Waiting(self.state.next_step, waiting))

    def _tell(self, message: m.Message) -> None:
        """To everybody who is connected."""
        for name in self.connected:
            self.run.ports.send(name, message)

    def applied(self, step: StepState, outcome: Outcome) -> None:
        """A step is applied and durable: tell its members, and everybody what comes next."""
        self.num_target_tokens += outcome.num_target_tokens
        for name in step.members:
            if name in self.connected:
                self.replies.done(name, outcome)
        if self.round_due:
            if self.secure is None:
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
            self.run.ports.disconnect(name, self.failure)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _round_update(self, name: str, message: m.RoundUpdate) -> None:
        self.run.check_bundle(name, message.tensors)
        if message.round < self.state.rounds_done:
            self.replies.result(name, self.state)
        else:
            self.rounds.add(name, message, self.state, strict=self.wait_s is None)

    def _advance_round(self) -> None:
        if self.secure is not None:
            self.secure.advance()
        elif self.rounds.complete(self.expected()):
            self._aggregate()

    def expected(self) -> tuple[str, ...]:
        """Whose parameters a round is made of: everybody's, or with bounded waiting, of those who trained in it."""
        if self.wait_s is None:
            return self.run.plan.client_names
        first = self.state.rounds_done * self.run.plan.training.steps_per_round
        return tuple(name for name, outcome in self.state.outcomes.items() if outcome.step >= first)

    def _aggregate(self) -> None:
        if self.rounds.aggregating:
            return
        self.rounds.aggregating = True
        contributions, before = self.rounds.contributions(), self.state

        def job() -> RunState:
            result = self.run.engine.average(contributions) if contributions else before.result
            state = replace(before, result=result, rounds_done=before.rounds_done + 1, round_tokens={})
            self.run.store.save_round(self.run.engine, state)
            return state

        self.run.ports.submit(Priority.CONTROL, job, self.aggregated)

    def aggregated(self, state: RunState) -> None:
        """A round is closed and durable: tell everybody, and go on."""
        self.run.state = state
        self.rounds.aggregating = False
        self.rounds.updates.clear()
        for name in self.connected:
            self.replies.result(name, self.state)
        if self.finished:
            self._tell(m.Finished(self.state.next_step))
        self.advance()
