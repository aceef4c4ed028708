"""What the server says to clients, as messages; and questions that change nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch

from fedsea.errors import AuthError, FedseaError, ProtocolError
from fedsea.model.passes import Entry
from fedsea.server.engine import Engine, Outcome
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member, Ports
from fedsea.server.state import RunState
from fedsea.server.step import StepState, gradient_of, only_tensor
from fedsea.types import Reply
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

Answer = Callable[[m.Message], None]


class Replies:
    """Makes the messages of a run, each client with the parameters that it holds.

    Args:
        ports: Where messages go.
        roster: What each client has.
    """

    def __init__(self, ports: Ports, roster: Mapping[str, Member]) -> None:
        self._ports = ports
        self._roster = roster

    def output(self, name: str, step: StepState, slot: int) -> None:
        """Hidden states of a micro-batch, back to its client."""
        reply = Reply({"": step.members[name].outputs[slot]})
        self._ports.send(name, m.Output(step.step, step.attempt, slot, False, reply))

    def gradient(self, name: str, step: StepState, slot: int) -> None:
        """The gradient at the trunk's input; nothing if the client needs none."""
        gradient = step.members[name].propagated[slot]
        reply = Reply({} if gradient is None else {"": gradient})
        self._ports.send(name, m.InputGradient(step.step, step.attempt, slot, reply))

    def done(self, name: str, outcome: Outcome) -> None:
        """A step is applied."""
        reply = Reply(self._held_by(name, outcome.gradients))
        message = m.StepDone(outcome.step, outcome.num_target_tokens, outcome.clip_coefficient, reply)
        self._ports.send(name, message)

    def result(self, name: str, state: RunState) -> None:
        """The newest round's aggregate; nothing if it was closed without one."""
        result = {} if state.skipped else self._held_by(name, state.result)
        self._ports.send(name, m.RoundResult(state.rounds_done - 1, Reply(result)))

    def _held_by(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key in self._roster[name].shapes}


class Questions:
    """Evaluations, their gradients, and the trunk's parameters: whatever goes wrong concerns the asker alone.

    Args:
        engine: The trunk; touched only inside submitted jobs.
        ports: The world.
        share_trunk: Whether the plan lets clients have the trunk's parameters.
    """

    def __init__(self, engine: Engine, ports: Ports, *, share_trunk: bool) -> None:
        self._engine = engine
        self._ports = ports
        self._share_trunk = share_trunk

    def evaluate(self, name: str, message: m.Forward, answer: Answer) -> None:
        """Run hidden states through the trunk without a graph."""
        entry = Entry(name, only_tensor(message), message.lengths, message.blocks, needs_gradient=False)

        def then(result: torch.Tensor) -> m.Message:
            return m.Output(message.step, 0, message.micro_batch, True, Reply({"": result}))

        self._submit(name, lambda: self._engine.passes.evaluate(entry), then, answer)

    def pull_back(self, name: str, message: m.Pullback, answer: Answer) -> None:
        """The gradient at the trunk's input, of what an evaluation computes."""
        entry = Entry(name, only_tensor(message), message.lengths, message.blocks, needs_gradient=True)
        gradient = gradient_of(message)

        def then(result: torch.Tensor) -> m.Message:
            return m.InputGradient(message.step, 0, message.micro_batch, Reply({"": result}), evaluate=True)

        self._submit(name, lambda: self._engine.passes.pull_back(entry, gradient), then, answer)

    def _submit(
        self,
        name: str,
        compute: Callable[[], torch.Tensor],
        message: Callable[[torch.Tensor], m.Message],
        answer: Answer,
    ) -> None:
        def then(result: torch.Tensor | FedseaError) -> None:
            if isinstance(result, FedseaError):
                answer(m.Failure(result.code, result.message, 0.0, -1, True))
            else:
                answer(message(result))

        self._ports.submit(Priority.EVALUATE, partial(_tried, name, compute), then)

    def fetch(self, state: RunState, answer: Answer) -> None:
        """The trunk's trained parameters.

        Raises:
            AuthError: The plan does not share them.
        """
        if not self._share_trunk:
            raise AuthError("The plan does not share the trunk's adapters (durability.share_trunk = false).")

        def then(tensors: dict[str, torch.Tensor]) -> None:
            answer(m.TrunkState(state.next_step, Reply(tensors)))

        self._ports.submit(Priority.EVALUATE, self._engine.parameters, then)


def _tried(name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor | FedseaError:
    try:
        return compute()
    except FedseaError as error:
        return error
    except Exception:
        log.exception("an evaluation of client %s failed", name)
        return ProtocolError("The server could not run this evaluation and logged why; tell its operator.")
