"""Calls at the client's end: the channel below them, and why one ended."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import grpc

from fedsea.errors import FedseaError
from fedsea.wire.errors import CODE_KEY, PeerClosed, error_from_status
from fedsea.wire.identity.diagnose import diagnose, split_address
from fedsea.wire.identity.identity import Identity
from fedsea.wire.transport import Timing, aio, client_options

T = TypeVar("T")

_UNEXPLAINED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN})
"""gRPC's own words for these do not say what to do; a look at the connection with plain sockets does."""

_PROVISIONAL = "Internal error from Core"
_STATUS_S = 2.0
"""Longest wait for the server's status once the call is known to have ended."""


class TlsIdentity(Protocol):
    """What a connection needs of `wire.identity.Identity`."""

    @property
    def key_pem(self) -> bytes:
        """Private key."""
        ...

    @property
    def certificate_pem(self) -> bytes:
        """Certificate chain."""
        ...

    @property
    def ca_pem(self) -> bytes:
        """The authority whose peers are trusted."""
        ...


class Ending:
    """How a call ended, noted the moment gRPC knows it.

    A write that meets the end of a call replaces the status that the server sent by a meaningless one of gRPC's own.

    Args:
        call: A gRPC call.
        address: Its server, for messages.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._known = asyncio.Event()
        self._found: tuple[grpc.StatusCode, str, dict[str, str]] | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        if self._found is None and _at_once(call.details()) != _PROVISIONAL:
            self._found = (_at_once(call.code()), *_words(_at_once(call.details()), _at_once(call.trailing_metadata())))
            self._known.set()

    async def reason(self) -> FedseaError:
        """Why the call ended: what the server said, if it said something."""
        try:
            async with asyncio.timeout(_STATUS_S):
                await self._known.wait()
        except TimeoutError:
            pass
        code, details, trailers = self._found or (grpc.StatusCode.UNAVAILABLE, "", {})
        if code is grpc.StatusCode.OK:
            return PeerClosed(f"{self._address} has ended the stream.")
        return error_from_status(code, details, trailers, self._address)

    async def reason_at_start(self, identity: Identity, timeout_s: float) -> FedseaError:
        """Why a call did not come up: what the server said, else what an examination of the connection finds."""
        error = await self.reason()
        code, _, trailers = self._found or (grpc.StatusCode.UNAVAILABLE, "", {})
        if CODE_KEY not in trailers and code in _UNEXPLAINED:
            return await examine(self._address, identity, timeout_s)
        return error


async def examine(address: str, identity: Identity, timeout_s: float) -> FedseaError:
    """`identity.diagnose` beside the event loop."""
    return await asyncio.to_thread(diagnose, address, identity, timeout_s)


def open_channel(address: str, identity: TlsIdentity, timing: Timing) -> Any:
    """A channel with mutual TLS; it connects with its first call.

    Raises:
        ConfigError: The address is none.
    """
    host, _ = split_address(address)
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)
    options = client_options(timing, proxy=not _is_loopback(host))
    return aio.secure_channel(address, credentials, options=options)


@asynccontextmanager
async def opened_channel(address: str, identity: TlsIdentity, timing: Timing) -> AsyncIterator[Any]:
    """The same, closed afterwards."""
    channel = open_channel(address, identity, timing)
    try:
        yield channel
    finally:
        await channel.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(details: str | None, trailers: Any) -> tuple[str, dict[str, str]]:
    return details or "", {str(key): str(value) for key, value in trailers or ()}


def _at_once(answer: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as finished:
        result: T = finished.value
        return result
    answer.close()
    raise AssertionError("gRPC asked to wait for the status of a finished call")
