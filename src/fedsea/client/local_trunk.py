"""A trunk in this process: one client alone, without a server. Same interface, same arithmetic, no network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch

from fedsea.client.trunk import Connected, Event, MicroBatch, Sealed, Standing, Tensors
from fedsea.errors import FedseaError, ProtocolError, StorageError
from fedsea.federation.schedule import place
from fedsea.model import adapters
from fedsea.model.decoding import Memory, TrunkDecoder, Turn
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.model.passes import Entry, TrunkPasses
from fedsea.model.segments import Trunk as TrunkSegment
from fedsea.plan import FederationPlan
from fedsea.storage import CheckpointStore
from fedsea.types import Release
from fedsea.wire import messages as m

_STATE = ("next_step", "rounds_done", "tokens", "clip")


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class LocalSession:
    """See `TrunkSession`; sees the trunk as it was when it was opened.

    Sessions of several threads share a trunk, which runs one at a time: what is closed may not be running.
    """

    def __init__(self, decoder: TrunkDecoder, memory: Memory, version: int, lock: threading.Lock) -> None:
        self.version = version
        self._lock = lock
        self._decoder = decoder
        self._memory = memory
        self._error: FedseaError | None = None

    def extend(
        self, hidden: Sealed, positions: Sequence[int], lengths: Sequence[int], sources: Sequence[int] = ()
    ) -> Future[torch.Tensor]:
        """See `TrunkSession.extend`."""
        future: Future[torch.Tensor] = Future()
        with self._lock:
            if self._error is None:
                turn = Turn(self._memory, tuple(positions), tuple(lengths), tuple(sources), hidden[""])
                (result,) = self._decoder.run([turn])
                if not isinstance(result, FedseaError):
                    future.set_result(result)
                    return future
                self._error = result
                self._memory.close()
        future.set_exception(self._error)
        return future

    def close(self) -> None:
        """See `TrunkSession.close`."""
        with self._lock:
            if self._error is None:
                self._error = ProtocolError("This session was closed on this side.")
                self._memory.close()


class LocalTrunk:
    """The trunk of a plan with one client, run in this process.

    Args:
        trunk: The trunk segment, adapters attached.
        plan: A plan whose only client is `name`.
        name: The client.
        folder: Where the trunk's state becomes durable after each step; None keeps it in memory only.
    """

    def __init__(
        self,
        trunk: TrunkSegment,
        plan: FederationPlan,
        name: str,
        folder: Path | None = None,
    ) -> None:
        self.plan = plan
        self.name = name
        trains = plan.trains_trunk
        self._passes = TrunkPasses(trunk, plan.seed, plan.training.max_batch_tokens, trains=trains)
        self._optimizer = SegmentOptimizer(adapters.trainable(trunk), plan.optimizer, plan.num_steps)
        self._decoder = TrunkDecoder(trunk)
        self._lock = threading.Lock()
        self._num_blocks = trunk.range.stop + plan.partition_of(name).output_blocks
        self._store = None if folder is None else CheckpointStore(folder, keep=plan.durability.keep)
        self._next_step = self._rounds_done = 0
        self._outcome = m.StepDone(-1, 0, 1.0)
        self._propagated = 0
        self._events: deque[Event] = deque([Connected()])
        try:
            self._restore()
        except BaseException:
            self.close(0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folder, whatever ended the training."""
        self.close(self._next_step)

    def _restore(self) -> None:
        found = None if self._store is None else self._store.latest()
        if found is None:
            return
        _, tensors, state = found
        self._next_step, self._rounds_done, tokens, clip = (state[key] for key in _STATE)
        self._outcome = m.StepDone(self._next_step - 1, tokens, clip, self._sums(tensors))
        parameters = {n.removeprefix("parameter."): t for n, t in tensors.items() if n.startswith("parameter.")}
        adapters.load(self._passes.trunk, parameters)
        self._optimizer.load_tensors({n: t for n, t in tensors.items() if n.startswith("optimizer.")})

    @staticmethod
    def _sums(tensors: Tensors) -> dict[str, torch.Tensor]:
        return {n.removeprefix("sum."): t for n, t in tensors.items() if n.startswith("sum.")}

    def _save(self) -> None:
        if self._store is None:
            return
        parameters = {f"parameter.{n}": t for n, t in self._optimizer.values().items()}
        sums = {f"sum.{n}": t for n, t in dict(self._outcome.tensors).items()}  # type: ignore[arg-type]
        values = (self._next_step, self._rounds_done, self._outcome.num_target_tokens, self._outcome.clip_coefficient)
        tensors = parameters | sums | self._optimizer.tensors()
        self._store.save(self._next_step, tensors, dict(zip(_STATE, values, strict=True)))

    def check_standing(self, standing: Standing) -> None:
        """Whether the client's state and the trunk's belong together, as a server looks at it.

        Raises:
            StorageError: One of the two is older than the other.
        """
        ours, theirs = self._next_step, standing.next_step
        if ours == theirs or (ours == theirs + 1 and standing.prepared_step == theirs):
            return
        raise StorageError(
            f"The client's checkpoint in this run folder is at step {theirs}, the trunk's at step {ours}: they do not "
            "belong together. Restore a backup of the whole run folder, or train with a new one."
        )

    # --- the Trunk protocol -----------------------------------------------------------------------------------------

    def next_event(self) -> Event:
        """What to do next; never waits."""
        if not self._events:
            self._events.append(self._decide())
        return self._events.popleft()

    def _decide(self) -> Event:
        if self._round_due:
            return m.RoundOpen(self._rounds_done)
        if self._next_step >= self.plan.num_steps:
            return m.Finished(self._next_step)
        self._passes.reset()
        self._optimizer.zero_grad()
        self._propagated = 0
        return m.StepOpen(self._next_step, 0)

    @property
    def _round_due(self) -> bool:
        last = place(self.plan, self._next_step - 1) if self._next_step else None
        complete = 0 if last is None else last.round + last.ends_round
        return self.plan.aggregation.sync != "personal" and self._rounds_done < complete

    def seal(self, release: Release) -> Sealed:
        """The tensors themselves."""
        return release.take()

    def forward(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.forward`."""
        entry = self._entry(where, hidden, self.plan.trains_below_cut(self.name))
        if not self.plan.sends_gradients(self.name):
            self._propagated += 1
        return _done(self._passes.forward(where.step, where.number, [entry])[self.name])

    def backward(self, where: MicroBatch, gradient: Sealed) -> Future[torch.Tensor | None]:
        """See `Trunk.backward`."""
        self._propagated += 1
        return _done(self._passes.backward(where.number, {self.name: gradient[""]})[self.name])

    def evaluate(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.evaluate`."""
        return _done(self._passes.evaluate(self._entry(where, hidden, False)))

    def pull_back(self, where: MicroBatch, hidden: Sealed, gradient: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.pull_back`."""
        return _done(self._passes.pull_back(self._entry(where, hidden, True), gradient[""]))

    def _entry(self, where: MicroBatch, hidden: Mapping[str, torch.Tensor], needs_gradient: bool) -> Entry:
        return Entry(self.name, hidden[""], where.lengths, where.blocks, needs_gradient)

    def ready(
        self,
        step: int,
        attempt: int,  # noqa: ARG002 (nothing is given up here)
        num_target_tokens: int,
        squared_norm: float,
        gradients: Sealed,
    ) -> None:
        """See `Trunk.ready`."""
        if step == self._outcome.step:
            self._events.append(self._outcome)
            return
        count, _ = self.plan.micro_batches_of(self.name)
        if step != self._next_step or self._propagated < count:
            return  # the trunk has lost its half of the step: the next event opens it again
        scale, settings = 1.0 / num_target_tokens, self.plan.optimizer
        total = self._optimizer.squared_norm(scale)
        if self.plan.aggregation.sync == "step":  # as a server does that is sent the gradients themselves
            total = _squares([*self._optimizer.gradients().values(), *dict(gradients).values()]) * scale * scale
        elif settings.clip_scope == "global":
            total += squared_norm
        clip = clip_coefficient(total, settings.max_norm) if settings.max_norm > 0 else 1.0
        self._optimizer.step(step, scale, clip)
        shared = clip if settings.clip_scope == "global" else 1.0
        self._outcome = m.StepDone(step, num_target_tokens, shared, dict(gradients))
        self._next_step = step + 1
        self._save()
        self._events.append(self._outcome)

    def update(self, round_index: int, num_target_tokens: int, parameters: Sealed) -> None:  # noqa: ARG002
        """See `Trunk.update`; the aggregate of one client is what it sent."""
        self._rounds_done = round_index + 1
        self._save()
        self._events.append(m.RoundResult(round_index, dict(parameters)))

    def tell(self, message: m.Message) -> None:
        """See `Trunk.tell`; alone there is nobody to hide a sum's parts among, so this is never asked for."""
        raise ProtocolError(f"A trunk in this process takes no {type(message).__name__}.")

    def open_session(self, max_tokens: int, num_sequences: int = 1) -> LocalSession:
        """See `Trunk.open_session`."""
        blocks = self.plan.partition_of(self.name).trunk(self._num_blocks)
        with self._lock:
            memory = self._decoder.open(num_sequences, max_tokens, blocks, self._passes.trunk.freeze())
        return LocalSession(self._decoder, memory, self._next_step, self._lock)

    def fetch(self) -> Future[m.TrunkState]:
        """See `Trunk.fetch`."""
        return _done(m.TrunkState(self._next_step, adapters.read(self._passes.trunk)))

    def abandon(self, step: int, error: FedseaError) -> None:  # noqa: ARG002 (nobody else is told)
        """See `Trunk.abandon`."""
        self.close(step)

    def close(self, next_step: int) -> None:  # noqa: ARG002 (nobody else is told)
        """Release the folder."""
        if self._store is not None:
            self._store.close()


def _squares(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))
