"""Calls without a stream: how a server stands, and a renewed certificate."""

from __future__ import annotations

import json
from typing import Any

from fedsea.errors import ProtocolError
from fedsea.wire.calls import Ending, opened_channel
from fedsea.wire.identity.identity import Identity
from fedsea.wire.transport import DEFAULT_TIMING, RENEW, STATUS, aio


async def call_status(address: str, identity: Identity, timeout_s: float = 10.0) -> dict[str, Any]:
    """Ask a server how it stands.

    Raises:
        FedseaError: As `connect`.
    """
    answer = await _unary(address, identity, STATUS, b"", timeout_s)
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
    return await _unary(address, identity, RENEW, csr_pem, timeout_s)


async def _unary(address: str, identity: Identity, method: str, request: bytes, timeout_s: float) -> bytes:
    async with opened_channel(address, identity, DEFAULT_TIMING) as channel:
        call = channel.unary_unary(method)(request, timeout=timeout_s)
        ending = Ending(call, address)
        try:
            answer: bytes = await call
        except aio.AioRpcError:
            raise await ending.reason_at_start(identity, timeout_s) from None
        return answer
