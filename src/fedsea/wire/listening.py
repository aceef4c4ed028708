"""Where a server may listen, and why it cannot; gRPC itself only says that it failed, or binds half of a name."""

from __future__ import annotations

import errno
import socket

from fedsea.errors import ConfigError


def check_listen(listen: str) -> None:
    """Whether `serve` could listen there now, said before a model is loaded for it.

    Raises:
        ConfigError: The address is none, is in use, or is not of this machine.
    """
    _check_free(*split_listen(listen))


def split_listen(listen: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, where the port may be 0.

    Raises:
        ConfigError: It has another form.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is no address to listen on: give HOST:PORT, for example 0.0.0.0:7443.")
    return host.removeprefix("[").removesuffix("]"), int(port)


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
