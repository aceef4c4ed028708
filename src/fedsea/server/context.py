"""What the coordinator and its parts share: the run, the world, and what the plan gives each client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsea.errors import ProtocolError
from fedsea.plan import FederationPlan
from fedsea.server.engine import Engine
from fedsea.server.ports import Member, Ports
from fedsea.server.state import RunState, ServerStore
from fedsea.wire import messages as m


@dataclass(slots=True)
class Run:
    """What the coordinator and its parts share.

    Attributes:
        plan: The resolved plan.
        engine: The trunk; touched only inside submitted jobs.
        store: Where state becomes durable.
        state: Where the run stands.
        roster: What each client of the plan has.
        ports: The world.
        connected: Clients that train and are there.
    """

    plan: FederationPlan
    engine: Engine
    store: ServerStore
    state: RunState
    roster: Mapping[str, Member]
    ports: Ports
    connected: set[str] = field(default_factory=set)

    @property
    def wait_s(self) -> float | None:
        """How long others wait for one client; None: as long as it takes."""
        training = self.plan.training
        return training.wait if training.mode == "batched" and training.wait != "all" else None

    def check_forward(self, name: str, message: m.Forward | m.Pullback) -> None:
        """Sizes and shapes were checked on arrival; here, what the plan gives this client."""
        if isinstance(message, m.Pullback) and not self.plan.trains_below_cut(name):
            raise ProtocolError(
                f"Client {name} asked for a gradient at the trunk's input, and the plan has it train nothing below the "
                "cut: install the same version of fedsea on both sides."
            )
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

    def check_bundle(self, name: str, tensors: object) -> None:
        """Shapes were checked on arrival; here, that nothing is missing."""
        expected = self.roster[name].shapes.keys()
        if not isinstance(tensors, dict) or tensors.keys() != expected:
            raise ProtocolError(f"Client {name} must send all {len(expected)} of its trained parameters at once.")
