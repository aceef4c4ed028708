"""Where a server may listen, and why it cannot; gRPC itself only says that it failed, or binds half of a name."""

from __future__ import annotations

import errno
import socket

from fedsea.errors import ConfigError
from fedsea.wire.address import host_and_port


def check_listen(listen: str) -> None:
    """Whether `serve` could listen there now, said before a model is loaded for it.

    Raises:
        ConfigError: The address is none, is in use, or is not of this machine.
    """
    _check_free(*split_listen(listen))


def split_listen(listen: str, what: str = "to listen on", example: str = "0.0.0.0:7443") -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[ADDRESS]:PORT`, where the port may be 0.

    Args:
        listen: The text.
        what: What the address is for, behind "is no address".
        example: One that is.

    Raises:
        ConfigError: It has another form.
    """
    found = host_and_port(listen)
    if found is None or found[1] > 65535:
        raise ConfigError(
            f"{listen[:120]!r} is no address {what}: give HOST:PORT, for example {example}, or [ADDRESS]:PORT for IPv6."
        )
    return found


def _check_free(host: str, port: int) -> None:
    """Find out why an address cannot be bound; gRPC itself only says that it failed, or binds half of a name."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise ConfigError(f"The host {host!r} does not resolve: listen on an address of this machine.") from None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise _bind_error(error, host, port) from None


def _bind_error(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"Port {port} on {host} is in use: stop what uses it, or choose another with --listen.")
    if error.errno == errno.EACCES:
        return ConfigError(f"This user may not listen on port {port}: choose one above 1023 with --listen.")
    return ConfigError(f"{host} is not an address of this machine: listen on one that is, or on 0.0.0.0.")
