"""What may be claimed of what a client has released: (epsilon, delta) of a unit, or the reason why nothing can be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedsea.plan import FederationPlan, NoiseSection, backward_channel, no_claim_reason, open_channels
from fedsea.privacy.accountant import delta_of, epsilon_of
from fedsea.privacy.pricing import pooled
from fedsea.privacy.spent import Spent
from fedsea.types import Channel, Purpose

MEANINGLESS_EPSILON = 50.0
"""Above it a claim says nothing that anybody could rely on, and is not made."""

UNCOVERED = "lengths, token counts and timings are not covered"


@dataclass(frozen=True, slots=True)
class Claim:
    """(epsilon, delta) for replacing one unit by another.

    Attributes:
        mu: Of the unit that has spent most, over all channels and purposes.
        unit: "token", "sequence" or "document".
        note: What goes with the claim.
        update_epsilon: Of replacing everything that the client has, for its updates alone; None without any.
    """

    epsilon: float
    delta: float
    mu: float
    unit: str
    note: str
    update_epsilon: float | None = None

    def sentence(self) -> str:
        """One line."""
        line = f"DP claim: epsilon = {self.epsilon:.4g} at delta = {self.delta:g} for replacing one {self.unit}"
        if self.update_epsilon is not None:
            line += f"; its updates alone: epsilon = {self.update_epsilon:.4g} for replacing the whole client"
        return f"{line} ({self.note})"


@dataclass(frozen=True, slots=True)
class NoClaim:
    """Nothing can be claimed.

    Attributes:
        epsilon: What the accountant says, where it is a number that protects nothing; else None.
    """

    reason: str
    epsilon: float | None = None

    def sentence(self) -> str:
        """One line."""
        return f"no DP claim: {self.reason}"


def claim_of(
    plan: FederationPlan, name: str, spent: Spent | None, noise: NoiseSection | None = None
) -> Claim | NoClaim:
    """What may be claimed.

    Args:
        plan: The plan.
        name: The client.
        spent: What its ledger says; None without a ledger.
        noise: Its noise, if it is stricter than the plan's.
    """
    noise = plan.noise if noise is None else noise
    if reason := no_claim_reason(plan, name, noise):
        return NoClaim(reason)
    if spent is None:
        return NoClaim("there is no ledger of what was released")
    for channel, count in spent.unbounded.items():
        return NoClaim(f"{count} releases on the {channel} channel left before under settings that bound nothing")
    mu = spent.total**0.5
    epsilon = epsilon_of(mu, noise.delta)
    if epsilon > MEANINGLESS_EPSILON:
        return NoClaim(f"epsilon = {epsilon:.4g} is no protection", epsilon)
    update = spent.account(Channel.UPDATE, Purpose.TRAINING)
    update_epsilon = epsilon_of(update.most**0.5, noise.delta) if update.releases else None
    return Claim(epsilon, noise.delta, mu, noise.unit, note_of(plan, name, noise), update_epsilon)


def note_of(plan: FederationPlan, name: str, noise: NoiseSection) -> str:
    """What a claim does not cover, and what it rests on."""
    parts = [UNCOVERED, "releases under other plans are not counted"]
    if noise.unit == "sequence":
        parts.append("a document that gives several sequences is not covered as a whole")
    trained = [
        side for side, found in (("input", plan.trains_below_cut(name)), ("output", plan.trains_output(name))) if found
    ]
    if trained:
        parts.append(
            f"every release counts for every unit, as the {' and '.join(trained)} segment is trained on all text"
        )
    return "; ".join(parts)


def report_of(
    plan: FederationPlan, name: str, spent: Spent | None, noise: NoiseSection | None = None
) -> dict[str, Any]:
    """A ledger's account as plain values, for tables and JSON."""
    noise = plan.noise if noise is None else noise
    claim = claim_of(plan, name, spent, noise)
    rows = (
        [] if spent is None else [_row(spent, channel, purpose, noise) for channel, purpose in sorted(spent.accounts)]
    )
    total = 0.0 if spent is None else spent.total
    bounded = isinstance(claim, Claim) or claim.epsilon is not None
    budget = noise.epsilon or None
    used = epsilon_of(total**0.5, noise.delta) if bounded else None
    return {
        "client": name,
        "trust_mode": plan.trust.mode,
        "unit": noise.unit,
        "delta": noise.delta,
        "backward_channel": backward_channel(plan, name),
        "open_channels": [channel.value for channel in open_channels(plan, name)],
        "pooled": [channel.value for channel, every in pooled(plan, name).items() if every],
        "rows": rows,
        "mu": total**0.5 if bounded else None,
        "epsilon": used,
        "budget": budget,
        "left": None if budget is None or used is None else max(0.0, budget - used),
        "delta_at_budget": None if budget is None or not bounded else delta_of(total**0.5, budget),
        "claim": asdict(claim) | {"made": isinstance(claim, Claim)},
        "sentence": claim.sentence(),
    }


def _row(spent: Spent, channel: Channel, purpose: Purpose, noise: NoiseSection) -> dict[str, Any]:
    account = spent.accounts[channel, purpose]
    bounded = channel not in spent.unbounded
    mu = account.most**0.5
    return {
        "channel": channel.value,
        "purpose": purpose.value,
        "releases": account.releases,
        "mu": mu if bounded else None,
        "epsilon": epsilon_of(mu, noise.delta) if bounded else None,
        "unit": "client" if channel is Channel.UPDATE else noise.unit,
    }
