"""What a plan says about trust: which channels are open, what may be claimed, and the sentence for every start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsea.plan.sections import NoiseSection
from fedsea.types import Channel

if TYPE_CHECKING:
    from fedsea.plan.federation import FederationPlan

_VALUES = {Channel.HIDDEN: "hidden states", Channel.GRADIENT: "gradients", Channel.UPDATE: "updates"}

MOST_DELTA = 1e-3
"""Above it a claim says nothing that anybody could rely on: with this chance it holds for no unit at all."""

TRUSTED_SERVER = (
    "Trust mode: trusted-server. Text stays here and the connection is encrypted, but the server CAN reconstruct "
    "the text from the hidden states and gradients that it receives. Use it only with a server you trust."
)


def open_channels(plan: FederationPlan, name: str) -> tuple[Channel, ...]:
    """The channels on which something of a client's data leaves it."""
    channels = [Channel.HIDDEN]
    if plan.sends_gradients(name):
        channels.append(Channel.GRADIENT)
    if plan.aggregation.sync != "personal" and plan.trains_own(name):
        channels.append(Channel.UPDATE)
    return tuple(channels)


def needs_norms(plan: FederationPlan) -> bool:
    """Whether the plan's clipping makes every client tell the norm of its own gradients."""
    summed_at_server = plan.aggregation.sync == "step"
    return plan.optimizer.clip_scope == "global" and plan.optimizer.max_norm > 0 and not summed_at_server


def no_claim_reason(plan: FederationPlan, name: str, noise: NoiseSection | None = None) -> str:
    """Why nothing can be claimed for a client under a plan, all reasons; "" if something can.

    Args:
        plan: The plan.
        name: The client.
        noise: Its noise, if it is stricter than the plan's.
    """
    if plan.trust.mode != "noised":
        return "trust.mode is trusted-server: nothing is clipped and no noise is added"
    noise = plan.noise if noise is None else noise
    reasons = []
    for channel in open_channels(plan, name):
        if not noise.std(channel):
            reasons.append(f"{_VALUES[channel]} leave without noise (noise.{channel}_std = 0)")
        elif not noise.clip(channel):
            reasons.append(
                f"no clip bounds the {_VALUES[channel]} (noise.{channel}_clip = 0), so their sensitivity is unknown"
            )
    if noise.delta > MOST_DELTA:
        reasons.append(f"noise.delta = {noise.delta:g} would let everything out that often; {MOST_DELTA:g} is the most")
    if needs_norms(plan) and plan.trains_own(name):
        reasons.append(
            "the norm of this client's gradients leaves it in every step without noise "
            '(set optimizer.clip_scope = "segment", or optimizer.max_norm = 0)'
        )
    return "; ".join(reasons)


def check_noise(plan: FederationPlan) -> None:
    """Rules between the trust mode, its noise and the rest of the plan.

    Raises:
        ValueError: Says what does not fit, and what to do.
    """
    noise = plan.noise
    if plan.trust.mode != "noised":
        if noise != NoiseSection():
            raise ValueError(
                '[noise] needs trust.mode = "noised"; under "trusted-server" nothing is clipped and no noise is added'
            )
        return
    for name in plan.client_names:
        opened = open_channels(plan, name)
        if not any(noise.std(channel) for channel in opened):
            raise ValueError(
                f'trust.mode = "noised" needs noise on something that leaves client {name}: set '
                f'{" or ".join(f"noise.{channel}_std" for channel in opened)} above 0, or trust.mode = "trusted-server"'
            )
    for channel in Channel:
        if noise.clip(channel) and not noise.std(channel):
            raise ValueError(f"noise.{channel}_clip bounds nothing without noise: set noise.{channel}_std above 0 too")
    if noise.unit == "token":
        for name in plan.client_names:
            _check_token_unit(plan, name)
    if noise.epsilon:
        for name in plan.client_names:
            if reason := no_claim_reason(plan, name):
                raise ValueError(f"noise.epsilon = {noise.epsilon:g} cannot be kept for client {name}: {reason}")


def _check_token_unit(plan: FederationPlan, name: str) -> None:
    advice = 'set noise.unit = "sequence"'
    if plan.partition_of(name).input_blocks:
        raise ValueError(
            f'noise.unit = "token" needs input_blocks = 0, and client {name} has more: behind the first block one '
            f"token changes the rows of all later ones; {advice}"
        )
    if plan.sends_gradients(name):
        raise ValueError(
            f'noise.unit = "token" needs a closed backward channel, and client {name} sends gradients, each of which '
            f"depends on all tokens of its sequence; {advice}, or train the output side only"
        )


def server_statement(plan: FederationPlan) -> str:
    """The same for the server's operator."""
    if plan.trust.mode == "trusted-server":
        return (
            "Trust mode: trusted-server. Connections are encrypted and clients keep their text, but this server CAN "
            "reconstruct the text from the hidden states and gradients that it receives: it is for clients "
            f"that trust its operator.{_closed(plan, '')}"
        )
    return trust_statement(plan)


def trust_statement(plan: FederationPlan, name: str = "", noise: NoiseSection | None = None) -> str:
    """The plain words that are said at every start, and stand in every report.

    Args:
        plan: The plan.
        name: The client that says it; "" for whoever speaks of all clients.
        noise: The client's noise, if it is stricter than the plan's.
    """
    if plan.trust.mode == "trusted-server":
        return f"{TRUSTED_SERVER}{_closed(plan, name)}"
    noise = plan.noise if noise is None else noise
    names = (name,) if name else plan.client_names
    opened = [channel for channel in Channel if any(channel in open_channels(plan, one) for one in names)]
    noised = [f"{_VALUES[c]} (standard deviation {noise.std(c):g})" for c in opened if noise.std(c)]
    bare = [_VALUES[c] for c in opened if not noise.std(c)]
    parts = ["Trust mode: noised. Text stays here and the connection is encrypted."]
    if noised:
        parts.append(f"Gaussian noise is added to {' and '.join(noised)} before they leave.")
    if bare:
        parts.append(f"No noise is added to {' and '.join(bare)}.")
    parts.append(
        "The server can still reconstruct text unless the audit shows otherwise: measure it with `fedsea audit`."
    )
    return " ".join(parts) + _closed(plan, name)


def _closed(plan: FederationPlan, name: str) -> str:
    state = backward_channel(plan, name)
    if state == "open":
        return ""
    whose = "this client's" if name else "the clients'"
    if not _shares(plan, name):
        leaves = "no gradients leave"
    elif plan.aggregation.sync == "step":
        leaves = f"gradients of {whose} own segments leave in every step"
    elif plan.aggregation.secure:
        leaves = f"no gradients leave, but {whose} trained parameters do in every round, in a masked sum"
    else:
        leaves = f"no gradients leave, but {whose} trained parameters do in every round"
    return f" backward channel: {state} ({leaves}; the forward channel still gives text away)."


def _shares(plan: FederationPlan, name: str) -> bool:
    """Whether trained parameters of a client (or of any) leave it, or gradients of them."""
    return any(Channel.UPDATE in open_channels(plan, one) for one in ((name,) if name else plan.client_names))


def backward_channel(plan: FederationPlan, name: str = "") -> str:
    """What is known of the gradients of a client, or of all clients.

    Returns:
        "closed" if no gradient leaves under the plan; "closed at the cut" if none leaves at the trunk's output, but
        those of the client's own segments do; else "open".
    """
    if any(plan.sends_gradients(one) for one in ((name,) if name else plan.client_names)):
        return "open"
    return "closed at the cut" if plan.aggregation.sync == "step" and _shares(plan, name) else "closed"
