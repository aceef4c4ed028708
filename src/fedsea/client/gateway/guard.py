"""Who may ask, and how much: API key, host names, size of a body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.requests import Request

from fedsea.client.gateway.errors import RequestError
from fedsea.errors import ConfigError

_BODY_S = 60.0
"""How long a body may take to come."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("[::1]")
    (True, True, False, True)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, api_key: str | None) -> None:
    """Refuse to serve others than this machine without a key.

    Raises:
        ConfigError: Says so, or that the key is no key.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigError("The API key is empty: give one with FEDSEA_API_KEY or --api-key, or leave it out.")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise ConfigError(
            "No client could send this API key: make it of letters, digits and signs of ASCII (openssl rand -hex 32 "
            "makes one), without spaces or line breaks around it."
        )
    if api_key is None and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, so the gateway needs an API key: set FEDSEA_API_KEY (or give "
            "--api-key), or use --host 127.0.0.1. It speaks plain HTTP: put a proxy with TLS before it."
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens where applications are to connect.

    Raises:
        ConfigError: The address cannot be used.
    """
    name = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        return socket.create_server((name, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or "no such address").partition(" (while")[0]
        raise ConfigError(
            f"The gateway cannot listen at {host}:{port} ({reason}): choose another --port or --host."
        ) from None


class Guard:
    """Checks a request before anything is read of its body.

    Args:
        api_key: What clients must present; None lets any program on this machine in.
    """

    def __init__(self, api_key: str | None) -> None:
        self._key = None if api_key is None else api_key.encode()

    def check(self, headers: Headers) -> None:
        """Refuse who may not ask.

        Without a key, a page in a browser on this machine must not be able to ask either: its requests come with
        another host name (DNS rebinding), or need a preflight, which is never answered, for their content type.

        Raises:
            RequestError: 401 or 403.
        """
        if self._key is None:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_loopback(name):
                raise RequestError(
                    "Without an API key the gateway answers to 127.0.0.1 and localhost only: use one of them as the "
                    "host of base_url, or start it with an API key.",
                    403,
                    reason="host_not_allowed",
                )
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise RequestError(
                "The API key is missing or wrong: send the gateway's key as `Authorization: Bearer …`.",
                401,
                reason="invalid_api_key",
            )


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        RequestError: It is larger than allowed, does not come, or is no JSON by its own word.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("Send the body as JSON, with `Content-Type: application/json`.", 415)
    too_large = RequestError(f"The body is larger than {most} bytes, the gateway's bound.", 413)
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit() or int(announced) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"The body did not come in {_BODY_S:g} s.", 408) from None
    return bytes(body)
