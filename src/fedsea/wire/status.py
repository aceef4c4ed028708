"""Calls without a stream: how a server stands, and a renewed certificate."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fedsea.errors import ProtocolError
from fedsea.wire.address import through_relay
from fedsea.wire.calls import Ending, enter, examine, opened_channel
from fedsea.wire.identity.identity import Identity
from fedsea.wire.sealing.handshake import Subject
from fedsea.wire.transport import DEFAULT_TIMING, RENEW, SESSION, STATUS, aio

_METHODS = {Subject.STATUS: STATUS, Subject.RENEWAL: RENEW}


async def call_status(address: str, identity: Identity, timeout_s: float = 10.0) -> dict[str, Any]:
    """Ask a server how it stands.

    Raises:
        FedseaError: As `connect`.
    """
    answer = await _ask(address, identity, Subject.STATUS, b"", timeout_s)
    try:
        status = json.loads(answer)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        raise ProtocolError(f"{address} answered with something that is no status: check that both sides are fedsea.")
    return status


async def call_renew(address: str, identity: Identity, csr_pem: bytes, timeout_s: float = 10.0) -> bytes:
    """Have a server sign a request for a new certificate of the same name.

    Returns:
        The certificate, PEM.

    Raises:
        FedseaError: As `connect`, or the server's reason for refusing.
    """
    return await _ask(address, identity, Subject.RENEWAL, csr_pem, timeout_s)


async def _ask(address: str, identity: Identity, subject: Subject, request: bytes, timeout_s: float) -> bytes:
    async with opened_channel(address, identity, DEFAULT_TIMING) as channel:
        if through_relay(address):
            return await _ask_sealed(channel, address, identity, subject, request, timeout_s)
        call = channel.unary_unary(_METHODS[subject])(request, timeout=timeout_s)
        ending = Ending(call, address)
        try:
            answer: bytes = await call
        except aio.AioRpcError:
            raise await ending.reason_at_start(identity, timeout_s) from None
        return answer


async def _ask_sealed(
    channel: Any, address: str, identity: Identity, subject: Subject, request: bytes, timeout_s: float
) -> bytes:
    """The same question in a sealed stream of its own, so that a relay neither reads nor answers it."""
    call = channel.stream_stream(SESSION)()
    ending = Ending(call, address)
    try:
        async with asyncio.timeout(timeout_s):
            pipe = await enter(call, ending, address, identity, subject, timeout_s)
            if request:
                await pipe.write(request)
            answer = await pipe.read()
    except TimeoutError:
        raise await examine(address, identity, timeout_s) from None
    finally:
        call.cancel()
    if answer is None:
        raise ProtocolError(f"The server behind {address} gave no answer; both sides need compatible versions.")
    return answer
