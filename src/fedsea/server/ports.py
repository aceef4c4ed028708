"""What the coordinator needs of the world, and what it knows of each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedsea.errors import FedseaError
from fedsea.server.executor.local import Priority
from fedsea.types import BlockRange
from fedsea.wire import messages as m


class Ports(Protocol):
    """What the coordinator needs of the world."""

    def send(self, client: str, message: m.Message) -> None:
        """Queue a message to a connected client."""
        ...

    def disconnect(self, client: str, error: FedseaError) -> None:
        """Tell a client why, and end its stream."""
        ...

    def submit(self, priority: Priority, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `job` on the engine thread, then `then(result)` here; an exception goes to `engine_failed`."""
        ...

    def clock(self) -> float:
        """Monotonic seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """What a client of the plan has.

    Attributes:
        blocks: The blocks that it leaves to the trunk.
        shapes: Its trained parameters.
    """

    blocks: BlockRange
    shapes: Mapping[str, tuple[int, ...]]
