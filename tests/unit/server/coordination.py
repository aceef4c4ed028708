"""A coordinator whose world is a list: jobs run when the test says so, and time passes when the test says so."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedsea.errors import FedseaError
from fedsea.plan import FederationPlan, parse_plan
from fedsea.server.coordinator import Coordinator
from fedsea.server.engine import Outcome, TrunkOverflow
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member
from fedsea.server.state import RunState, ServerStore
from fedsea.types import BlockRange, Reply
from fedsea.wire import messages as m

SHAPES = {"model.layers.0.x.lora_A.weight": (2, 2)}
NAME = next(iter(SHAPES))


class FakePasses:
    """Doubles hidden states, trebles gradients, and notes what ran."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls
        self.fails: BaseException | None = None

    def forward(self, step: int, slot: int, entries: Any) -> dict[str, torch.Tensor]:
        self.calls.append(("forward", step, slot, tuple(entry.client for entry in entries)))
        self._maybe_fail()
        return {entry.client: entry.hidden_TH * 2 for entry in entries}

    def backward(self, slot: int, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        self.calls.append(("backward", slot, tuple(gradients)))
        self._maybe_fail()
        return {client: gradient * 3 for client, gradient in gradients.items()}

    def evaluate(self, entry: Any) -> torch.Tensor:
        self.calls.append(("evaluate", entry.client))
        return entry.hidden_TH * 5

    def _maybe_fail(self) -> None:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error


class FakeEngine:
    """What the coordinator submits, without a model."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.passes = FakePasses(self.calls)
        self.weights: dict[str, float] = {}
        self.contributed: dict[str, float] = {}
        self.overflows = False

    def reset(self) -> None:
        self.calls.append(("reset",))

    def finish(self, step: int, tokens: int, norm: float, gradients: Any) -> Outcome:
        self.calls.append(("finish", step, tokens, norm, len(gradients)))
        if self.overflows:
            self.overflows = False
            raise TrunkOverflow("The trunk's gradient overflowed.")
        return Outcome(step, tokens, 0.5, {NAME: torch.ones(2, 2)} if any(gradients.values()) else {})

    def shares(self, step: int, passes: Any) -> dict[str, float]:
        self.calls.append(("shares", step, {name: [slot for slot, _, _ in ps] for name, ps in passes.items()}))
        return self.contributed

    def average(self, contributions: Any) -> dict[str, torch.Tensor]:
        self.calls.append(("average", tuple(contributions)))
        self.weights = {name: c.weight for name, c in contributions.items()}
        total = sum(c.weight for c in contributions.values())
        return {NAME: sum(c.tensors[NAME] * (c.weight / total) for c in contributions.values())}

    def take_means(self, means: Any, weights: Any, total: int) -> dict[str, torch.Tensor]:
        self.calls.append(("take_means", dict(weights), total))
        return dict(means)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"trunk": torch.ones(1)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"parameter.trunk": torch.ones(1)}

    def load_tensors(self, tensors: Any) -> None:
        self.calls.append(("load", tuple(tensors)))


class World:
    """Ports, clients and clock of one coordinator.

    Args:
        folder: Run folder; an existing one is gone on with.
        names: Clients, in the plan's order.
        verifier: For plans with secure aggregation.
        plan: Sections of the plan.
    """

    def __init__(
        self,
        folder: Path,
        *names: str,
        clients: dict[str, dict[str, Any]] | None = None,
        verifier: Any = None,
        **plan: Any,
    ) -> None:
        entries = [{"name": name, **(clients or {}).get(name, {})} for name in names]
        self.plan: FederationPlan = parse_plan({"model": {"path": "m"}, "clients": entries, **plan})
        self.engine = FakeEngine()
        self.sent: list[tuple[str, m.Message]] = []
        self.ended: dict[str, FedseaError] = {}
        self.now = 0.0
        self._jobs: list[tuple[int, int, Callable[[], Any], Callable[[Any], None]]] = []
        self._order = itertools.count()
        self.store = ServerStore(folder, self.plan)
        state = self.store.restore(self.engine)  # type: ignore[arg-type]
        if state is None:
            state = RunState("run")
            self.store.save(self.engine, state)  # type: ignore[arg-type]
        roster = {name: Member(BlockRange(1, 4), SHAPES) for name in names}
        self.coordinator = Coordinator(self.plan, self.engine, self.store, state, roster, self, verifier)  # type: ignore[arg-type]

    # --- ports ------------------------------------------------------------------------------------------------------

    def send(self, client: str, message: m.Message) -> None:
        self.sent.append((client, message))

    def disconnect(self, client: str, error: FedseaError) -> None:
        self.ended[client] = error

    def submit(self, priority: Priority, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        heapq.heappush(self._jobs, (priority, next(self._order), job, then))

    def clock(self) -> float:
        return self.now

    # --- what a test does -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the engine until nothing is left to do."""
        while self._jobs:
            _, _, job, then = heapq.heappop(self._jobs)
            try:
                result = job()
            except BaseException as error:
                self.coordinator.engine_failed(error)
            else:
                then(result)

    def pass_time(self, seconds: float) -> None:
        """Time passes, and the coordinator looks at the clock before and after."""
        self.coordinator.tick()
        self.now += seconds
        self.coordinator.tick()
        self.run()

    def join(self, *names: str, next_step: int = 0, prepared_step: int = -1, round: int = 0) -> None:
        for name in names:
            self.coordinator.join(name, m.Join("", next_step, prepared_step, round))
        self.run()

    def _now(self) -> tuple[int, int]:
        step = self.coordinator.step
        return (self.coordinator.state.next_step, 0) if step is None else (step.step, step.attempt)

    def forward(self, name: str, slot: int = 0, value: float = 1.0, **changes: Any) -> None:
        step, attempt = self._now()
        count = self.plan.micro_batches_of(name)[0]
        fields = {
            "step": step,
            "attempt": attempt,
            "micro_batch": slot,
            "num_micro_batches": count,
            "blocks": BlockRange(1, 4),
            "lengths": (2,),
            "num_target_tokens": 2,
            "evaluate": False,
            "tensors": {"": torch.full((2, 3), value)},
        }
        self.coordinator.receive(name, m.Forward(**(fields | changes)))
        self.run()

    def backward(self, name: str, slot: int = 0, value: float = 1.0, **changes: Any) -> None:
        step, attempt = self._now()
        fields = {"step": step, "attempt": attempt, "micro_batch": slot, "tensors": {"": torch.full((2, 3), value)}}
        self.coordinator.receive(name, m.Backward(**(fields | changes)))
        self.run()

    def ready(
        self, name: str, step: int | None = None, tokens: int | None = None, tensors: Any = None, norm: float = 1.0
    ) -> None:
        now, attempt = self._now()
        if tokens is None:
            tokens = 2 * self.plan.micro_batches_of(name)[0]
        message = m.StepReady(now if step is None else step, attempt, tokens, norm, tensors or {})
        self.coordinator.receive(name, message)
        self.run()

    def work(self, *names: str) -> None:
        """All micro-batches of a step, forward and backward, up to before `ready`."""
        for name in names:
            for slot in range(self.plan.micro_batches_of(name)[0]):
                self.forward(name, slot)
        for name in names:
            for slot in range(self.plan.micro_batches_of(name)[0]):
                self.backward(name, slot)

    def whole_step(self, *names: str) -> None:
        self.work(*names)
        for name in names:
            self.ready(name, self.coordinator.state.next_step)

    def update(self, name: str, value: float, tokens: int | None = None, round: int = 0) -> None:
        if tokens is None:
            tokens = self.coordinator.state.round_tokens.get(name, 0)
        self.coordinator.receive(name, m.RoundUpdate(round, tokens, {NAME: torch.full((2, 2), value)}))
        self.run()

    def to(self, name: str, kind: type[Any]) -> list[Any]:
        """Messages of a kind that a client was sent."""
        return [message for client, message in self.sent if client == name and isinstance(message, kind)]

    def ran(self, what: str) -> list[tuple[Any, ...]]:
        """Engine calls of a kind."""
        return [call for call in self.engine.calls if call[0] == what]


def tensor_of(message: Any) -> torch.Tensor:
    assert isinstance(message.tensors, Reply)
    return message.tensors.tensors[""]
