"""Bookkeeping of a round's end: whether one is due, and whose parameters are here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedsea.errors import ProtocolError
from fedsea.federation.aggregation import Contribution
from fedsea.federation.schedule import place
from fedsea.plan import FederationPlan
from fedsea.server.ports import Member
from fedsea.server.state import RunState
from fedsea.wire import messages as m


class RoundKeeper:
    """Collects the clients' trained parameters between a round's last step and its aggregation.

    Attributes:
        updates: Client to what it sent.
        aggregating: Whether the engine is at it.
    """

    def __init__(self, plan: FederationPlan, roster: Mapping[str, Member]) -> None:
        self.plan = plan
        self.updates: dict[str, Contribution] = {}
        self.aggregating = False
        trained = any(member.shapes for member in roster.values())
        self._aggregates = trained and plan.aggregation.sync != "personal"

    def due(self, state: RunState) -> bool:
        """Whether a round's steps are all applied and its aggregation is not."""
        if not self._aggregates or state.next_step == 0:
            return False
        last = place(self.plan, state.next_step - 1)
        return state.rounds_done < last.round + last.ends_round

    def add(self, name: str, message: m.RoundUpdate, state: RunState) -> None:
        """Record a client's parameters; sent again, they replace the first ones.

        Raises:
            ProtocolError: The round is not due.
        """
        if message.round != state.rounds_done or not self.due(state):
            raise ProtocolError(f"Client {name} sent an update for round {message.round}, which is not due.")
        if not self.aggregating and isinstance(message.tensors, dict):
            self.updates[name] = Contribution(message.tensors, float(message.num_target_tokens))

    def complete(self, expected: Collection[str]) -> bool:
        """Whether everybody expected has sent its parameters."""
        return bool(expected) and all(name in self.updates for name in expected)

    def missing(self, expected: Collection[str]) -> tuple[str, ...]:
        """Clients for whom others wait."""
        if self.aggregating or not self.updates:
            return ()
        return tuple(name for name in expected if name not in self.updates)
