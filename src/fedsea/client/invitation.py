"""The first words with a server: what it says of itself before anything is agreed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import fedsea
from fedsea.client.retry import RetryPolicy, Tries
from fedsea.errors import FedseaError, ProtocolError, TransportError
from fedsea.plan import FederationPlan, parse_plan_json
from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream, connect
from fedsea.wire.frames import PROTOCOL_VERSION
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import HANDSHAKE


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a server says of itself before anything is agreed on.

    Attributes:
        plan: Of the federation.
        run_id: Of the run.
        sealed: Whether it came, and what follows will go, sealed to the server itself.
    """

    plan: FederationPlan
    run_id: str
    sealed: bool = False


async def greet(stream: ClientStream) -> m.Welcome:
    """Begin a session: say hello, and hear the server's plan.

    Raises:
        FedseaError: The server answers something else, or the stream broke.
    """
    await stream.send(m.Hello(PROTOCOL_VERSION, fedsea.__version__))
    message = await stream.receive()
    if not isinstance(message, m.Welcome):
        raise ProtocolError("The server did not begin with its plan: both sides need compatible versions of fedsea.")
    return message


def check_sealed(plan: FederationPlan, stream: ClientStream) -> None:
    """Refuse to take part unsealed in what the plan says is sealed.

    Raises:
        ProtocolError: The server did not ask for it.
    """
    if plan.wire.sealed and not stream.sealed:
        raise ProtocolError(
            "The server's plan has wire.sealed = true, but it did not seal this stream: tell its operator."
        )


async def fetch_invitation(address: str, identity: Identity, timeout_s: float = 30.0) -> Invitation:
    """Ask a server for its plan, and check that both sides read the same in it.

    Raises:
        ConfigError: The plan cannot be read here, or its hash differs.
        FedseaError: The server cannot be reached or refuses.
    """
    try:
        async with asyncio.timeout(timeout_s), await connect(address, identity, limits=HANDSHAKE) as stream:
            welcome = await greet(stream)
    except TimeoutError:
        raise TransportError(f"{address} did not answer in {timeout_s:g} s; try again later.") from None
    plan = parse_plan_json(welcome.plan_json)
    if plan.sha256() != welcome.plan_sha256:
        raise ProtocolError(
            f"This side's version of fedsea ({fedsea.__version__}) reads another plan than the server sent: install "
            "the server's version on both sides."
        )
    check_sealed(plan, stream)
    return Invitation(plan, welcome.run_id, stream.sealed)


async def seek_invitation(address: str, identity: Callable[[], Identity], retry: RetryPolicy) -> Invitation:
    """`fetch_invitation`, tried again while the server cannot be reached.

    Raises:
        FedseaError: The server refuses, or the policy's time is used up.
    """
    tries = retry.tries()
    while True:
        try:
            return await fetch_invitation(address, identity())
        except FedseaError as error:
            if not await pause_before(error, tries):
                raise


async def pause_before(error: FedseaError, tries: Tries) -> bool:
    """Wait before the next try; False if there is to be none."""
    pause = tries.pause_after(error)
    if pause is None:
        return False
    await asyncio.sleep(pause)
    return True
