"""Who watches a client's training run, and how several watch at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from fedsea.plan import FederationPlan


class StepLike(Protocol):
    """One applied step, as the client's trainer reports it.

    Attributes:
        mean_loss: Nats per target token, before the step.
        seconds: Phase to wall seconds.
    """

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def round(self) -> int: ...  # noqa: D102
    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def mean_loss(self) -> float: ...  # noqa: D102
    @property
    def num_target_tokens(self) -> int: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> Mapping[str, float]: ...  # noqa: D102


class EvaluationLike(Protocol):
    """Loss on the held-out split after `next_step` steps."""

    @property
    def next_step(self) -> int: ...  # noqa: D102
    @property
    def mean_loss(self) -> float: ...  # noqa: D102
    @property
    def num_target_tokens(self) -> int: ...  # noqa: D102


class RunObserver(Protocol):
    """The least that an observer does; satisfies the trainer's `Observer`."""

    def step(self, report: StepLike) -> None:
        """A step was applied."""
        ...

    def evaluation(self, report: EvaluationLike) -> None:
        """The held-out split was evaluated."""
        ...


class Link(Protocol):
    """A connection, as far as a display looks at it."""

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        ...


@runtime_checkable
class LinkObserver(Protocol):
    """What an observer may do besides: follow the connection."""

    def begin(self, plan: FederationPlan, name: str, link: Link | None = None) -> None:
        """The plan is agreed on; `name` is this client; `link` is None without a server."""
        ...

    def waiting(self, names: tuple[str, ...]) -> None:
        """The server waits for these clients; none: it goes on."""
        ...

    def bytes(self, up: int, down: int) -> None:
        """Bytes sent and received by this process so far."""
        ...


class Observers:
    """Tells several observers the same; those that do not follow the connection hear of steps only."""

    def __init__(self, observers: tuple[RunObserver, ...]) -> None:
        self._observers = observers
        self._following = tuple(item for item in observers if isinstance(item, LinkObserver))

    def step(self, report: StepLike) -> None:
        """A step was applied."""
        for observer in self._observers:
            observer.step(report)

    def evaluation(self, report: EvaluationLike) -> None:
        """The held-out split was evaluated."""
        for observer in self._observers:
            observer.evaluation(report)

    def begin(self, plan: FederationPlan, name: str, link: Link | None = None) -> None:
        """The plan is agreed on."""
        for observer in self._following:
            observer.begin(plan, name, link)

    def loading(self, what: str) -> None:
        """This is being done before anything can be trained; told to whoever has a `loading`."""
        for observer in self._observers:
            getattr(observer, "loading", lambda _: None)(what)

    def waiting(self, names: tuple[str, ...]) -> None:
        """The server waits for these clients."""
        for observer in self._following:
            observer.waiting(names)

    def bytes(self, up: int, down: int) -> None:
        """Bytes sent and received so far."""
        for observer in self._following:
            observer.bytes(up, down)


def compose(*observers: RunObserver) -> Observers:
    """One observer that tells all of `observers`, in their order."""
    return Observers(observers)
