"""Sessions whose world is a list: batches run when the test says so, and time passes when the test says so.

The trunk is a running sum: the output of a token is the sum of its sequence's hidden states so far, as its cache has
them. So whatever is missing, double or foreign in a cache shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fedsea.model.cache import CacheArena, Frozen, SequenceCache
from fedsea.model.decoding import TrunkDecoder
from fedsea.model.trunk import CachedPart
from fedsea.plan.sections import InferenceSection
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member
from fedsea.server.sessions import Sessions
from fedsea.types import BlockRange
from fedsea.wire import messages as m

BLOCKS = BlockRange(1, 4)
SIZE = 4
TOKEN_BYTES = 2 * SIZE * 4  # keys and values of one block in fp32


class SummingTrunk:
    """One block, without weights."""

    hidden_size = SIZE
    device = torch.device("cpu")
    range = BLOCKS

    def __init__(self) -> None:
        self.arena = CacheArena(1)
        self.caches = True
        self.num_calls = 0
        self.fails: Callable[[torch.Tensor], Exception | None] = lambda _: None

    def open_cache(self, max_tokens: int) -> SequenceCache:
        return self.arena.open(max_tokens)

    def freeze(self) -> Frozen:
        return Frozen()

    def extend_group(self, parts: Sequence[CachedPart], frozen: Frozen) -> list[torch.Tensor]:
        self.num_calls += 1
        return [self._extend(part) for part in parts]

    def _extend(self, part: CachedPart) -> torch.Tensor:
        outputs = []
        for rows, cache in zip(part.hidden_TH.split(part.extension.lengths), part.extension.caches, strict=True):
            _, values = cache.write(0, rows[None], rows[None])
            outputs.append(values[0].cumsum(0)[-len(rows) :])
        if (error := self.fails(part.hidden_TH)) is not None:
            raise error
        return torch.cat(outputs)


class Stream:
    """One connection of a client."""

    def __init__(self, world: World, client: str) -> None:
        self.world = world
        self.client = client
        self.owners: dict[int, int] = {}
        self.answers: list[m.Message] = []

    def send(self, message: m.Message) -> None:
        self.world.sessions.receive(self.client, self.owners, message, self.answers.append)

    def open(self, session: int = 0, *, max_tokens: int = 32, num_sequences: int = 1, owner: int = 7) -> m.Message:
        """The answer."""
        self.open_silently(session, max_tokens=max_tokens, num_sequences=num_sequences, owner=owner)
        return self.answers[-1]

    def open_silently(self, session: int, *, max_tokens: int, num_sequences: int = 1, owner: int = 7) -> None:
        """The answer may wait."""
        self.send(m.SessionOpen(session, owner, num_sequences, max_tokens, BLOCKS))

    def forward(
        self,
        session: int,
        number: int,
        rows: torch.Tensor,
        position: int | tuple[int, ...] = 0,
        *,
        lengths: tuple[int, ...] = (),
        sources: tuple[int, ...] = (),
        silent: bool = False,
    ) -> None:
        positions = (position,) if isinstance(position, int) else position
        self.send(m.SessionForward(session, number, positions, lengths or (len(rows),), sources, silent, {"": rows}))

    def take(self) -> m.Message:
        """The oldest answer that was not taken yet."""
        return self.answers.pop(0)

    def outputs(self) -> dict[tuple[int, int], torch.Tensor]:
        """All outputs that came, by session and number; anything else fails."""
        found = list(self.answers)
        self.answers.clear()
        assert all(isinstance(answer, m.SessionOutput) for answer in found), found
        return {(one.session, one.number): one.tensors.tensors[""] for one in found}  # type: ignore[union-attr]


class World:
    """See `server.ports.Ports`.

    Args:
        names: Clients.
        published: Whether the trunk is there already.
        settings: Of the plan's `inference` section.
    """

    def __init__(self, *names: str, published: bool = True, **settings: Any) -> None:
        self.trunk = SummingTrunk()
        self.now = 0.0
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self.decoder = TrunkDecoder(self.trunk)  # type: ignore[arg-type]
        roster = {name: Member(BLOCKS, {}) for name in names or ("a", "b")}
        self.sessions = Sessions(InferenceSection(**settings), self.decoder, self, roster)  # type: ignore[arg-type]
        if published:
            self.publish(0)

    def publish(self, step: int) -> None:
        self.sessions.publish(SimpleNamespace(next_step=step))  # type: ignore[arg-type]

    def submit(self, priority: Priority, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        assert priority is Priority.DECODE
        self.jobs.append((job, then))

    def clock(self) -> float:
        return self.now

    def start(self) -> Callable[[], None]:
        """Run the next batch on the engine; call the result to deliver what came of it."""
        job, then = self.jobs.pop(0)
        result = job()
        return lambda: then(result)

    def run(self) -> None:
        """Run whatever waits."""
        while self.jobs:
            self.start()()

    @property
    def used(self) -> tuple[int, int, int]:
        """Pages, bytes and sequences set aside."""
        status = self.sessions.status()
        return status["pages"], status["kv_bytes"], status["sequences"]


def rows(number: int, seed: int = 0) -> torch.Tensor:
    """Hidden states."""
    return torch.randn(number, SIZE, generator=torch.Generator().manual_seed(seed))
