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
        updates: Client to what it sent; without weight if it trained on nothing of this round.
        aggregating: Whether the engine is at it.
    """

    def __init__(self, plan: FederationPlan, roster: Mapping[str, Member]) -> None:
        self.plan = plan
        self.updates: dict[str, Contribution] = {}
        self.aggregating = False
        trained = any(member.shapes for member in roster.values())
        self._aggregates = trained and plan.aggregation.sync != "personal"

    def done_after(self, step: int, before: int) -> int:
        """Rounds done when `step` is applied, if `before` were: a round without an aggregation ends with its steps."""
        last = place(self.plan, step)
        return before if self._aggregates else last.round + last.ends_round

    def due(self, state: RunState) -> bool:
        """Whether a round's steps are all applied and its aggregation is not."""
        if not self._aggregates or state.next_step == 0:
            return False
        last = place(self.plan, state.next_step - 1)
        return state.rounds_done < last.round + last.ends_round

    def add(self, name: str, message: m.RoundUpdate, state: RunState, *, strict: bool) -> None:
        """Record a client's parameters; sent again, they replace the first ones.

        Their weight is what was counted here while the client trained, never what it says.

        Args:
            name: The client.
            message: What it sent.
            state: Where the run stands.
            strict: Every client has trained in every step that it was counted in; otherwise it may have begun anew.

        Raises:
            ProtocolError: The round is not due, or the client claims more than it has trained (strict: or less).
        """
        if message.round != state.rounds_done or not self.due(state):
            raise ProtocolError(f"Client {name} sent an update for round {message.round}, which is not due.")
        counted, claimed = state.round_tokens.get(name, 0), message.num_target_tokens
        if claimed > counted or (strict and claimed < counted):
            raise ProtocolError(
                f"Client {name} says that it trained on {claimed} target tokens in round {message.round}; this server "
                f"counted {counted}. Restore the newest run folder on the side that is behind."
            )
        if not self.aggregating and isinstance(message.tensors, dict):
            self.updates[name] = Contribution(message.tensors, float(min(counted, claimed)))

    def complete(self, expected: Collection[str]) -> bool:
        """Whether everybody expected has sent its parameters."""
        return bool(expected) and all(name in self.updates for name in expected)

    def missing(self, expected: Collection[str]) -> tuple[str, ...]:
        """Those expected whose parameters are not here."""
        if self.aggregating:
            return ()
        return tuple(name for name in expected if name not in self.updates)

    def contributions(self) -> dict[str, Contribution]:
        """What the round is made of: not of parameters that were not trained in it, which some methods do not weigh."""
        return {name: update for name, update in self.updates.items() if update.weight > 0}
