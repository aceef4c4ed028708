"""Where a step stands in the run: a pure function of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from fedsea.plan import FederationPlan


@dataclass(frozen=True, slots=True)
class StepPlace:
    """A step's place.

    Attributes:
        step: Number in the run, from 0.
        round: Round it belongs to, from 0.
        members: Clients that may take part, in the plan's order.
        ends_round: Whether the round's aggregation follows.
    """

    step: int
    round: int
    members: tuple[str, ...]
    ends_round: bool


def place(plan: FederationPlan, step: int) -> StepPlace:
    """The place of `step`.

    In "sequential" mode every client has one turn of `steps_per_round` steps in each round, in the plan's order.

    Example:
        >>> from fedsea.plan import parse_plan
        >>> plan = parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}, {"name": "b"}],
        ...                    "training": {"mode": "sequential", "steps_per_round": 2, "rounds": 2}})
        >>> [place(plan, step).members for step in range(4)]
        [('a',), ('a',), ('b',), ('b',)]
        >>> place(plan, 3).ends_round, place(plan, 4).round
        (True, 1)
    """
    names, per_turn = plan.client_names, plan.training.steps_per_round
    sequential = plan.training.mode == "sequential"
    per_round = per_turn * (len(names) if sequential else 1)
    round_index, inside = divmod(step, per_round)
    members = (names[inside // per_turn],) if sequential else names
    return StepPlace(step, round_index, members, ends_round=inside == per_round - 1)
