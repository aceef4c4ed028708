"""Both kinds of trunk, set up alike, and the arithmetic that they must do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from fedsea.client import setup
from fedsea.client.invitation import fetch_invitation
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.retry import RetryPolicy
from fedsea.client.trunk import MicroBatch, Standing, Trunk
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.model.optim import SegmentOptimizer, clip_coefficient
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange
from fedsea.wire.identity.identity import Identity
from tests.support.assets import HIDDEN
from tests.support.federation import Federation

BOUNDARY = Boundary("trusted-server")
LENGTHS = (5, 2, 4)
ROWS = sum(LENGTHS)
DEADLINE_S = 30.0


def values(seed: int) -> torch.Tensor:
    """Hidden states or a gradient."""
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def where(step: int = 0, attempt: int = 0, number: int = 0, count: int = 1) -> MicroBatch:
    return MicroBatch(step, attempt, number, count, LENGTHS, 7, BlockRange(1, 4))


def get(future: Future[Any]) -> Any:
    return future.result(DEADLINE_S)


class Direct:
    """The trunk computed without any of the code under test but the segment itself."""

    def __init__(self, federation: Federation) -> None:
        plan = self.plan = federation.plan
        self.segment = load_trunk(open_checkpoint(plan.model.path), BlockRange(1, 4), dtype=torch.float32)
        adapters.attach(self.segment, plan.adapter, plan.adapter.trunk, plan.seed)
        self.optimizer = SegmentOptimizer(adapters.trainable(self.segment), plan.optimizer, plan.num_steps)

    def run(self, hidden: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, and gradient at the input; the parameters' gradients add up."""
        hidden = hidden.clone().requires_grad_()
        output = self.segment.forward(hidden, LENGTHS)
        output.backward(gradient)
        assert hidden.grad is not None
        return output.detach(), hidden.grad

    def step(self, step: int, num_target_tokens: int, clients_squared_norm: float) -> float:
        """The optimizer step; its clip coefficient."""
        scale = 1.0 / num_target_tokens
        norm = self.optimizer.squared_norm(scale) + clients_squared_norm
        clip = clip_coefficient(norm, self.plan.optimizer.max_norm)
        self.optimizer.step(step, scale, clip)
        return clip

    def parameters(self) -> dict[str, torch.Tensor]:
        return adapters.read(self.segment)


@dataclass
class Bench:
    """A federation of one client, and trunks for it.

    Attributes:
        open: Makes a trunk of the kind under test for a client that stands somewhere.
    """

    federation: Federation
    open: Callable[..., Trunk]
    opened: list[Trunk] = field(default_factory=list)

    def trunk(self, standing: Standing | None = None, **options: Any) -> Trunk:
        self.opened.append(self.open(standing or Standing(), **options))
        return self.opened[-1]

    @property
    def direct(self) -> Direct:
        return Direct(self.federation)

    def close(self) -> None:
        for trunk in self.opened:
            if isinstance(trunk, RemoteTrunk):
                trunk.__exit__()
            else:
                trunk.close(0)


def local_bench(federation: Federation) -> Bench:
    plan = federation.plan

    def open_trunk(_: Standing) -> Trunk:
        return LocalTrunk(Direct(federation).segment, plan, "a", federation.folder / "trunk")

    return Bench(federation, open_trunk)


def remote_bench(federation: Federation) -> Bench:
    if federation.server is None:
        federation.start_server()

    def open_trunk(standing: Standing, address: str = "", retry_for_s: float = 30.0, **options: Any) -> Trunk:
        identity = Identity.load(federation.identities / "a")
        address = address or federation.address
        invitation = asyncio.run(fetch_invitation(address, identity))
        limits = setup.wire_limits(invitation.plan, open_checkpoint(federation.plan.model.path), "a", trunk=True)
        retry = RetryPolicy(retry_for_s, first_s=0.02)
        return RemoteTrunk(address, lambda: identity, invitation, limits, lambda: standing, retry, **options).start()

    return Bench(federation, open_trunk)
