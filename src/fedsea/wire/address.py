"""Where a server is, and whether TLS ends on the way: `HOST:PORT`, or `relay://HOST:PORT`."""

from __future__ import annotations

from fedsea.errors import ConfigError

RELAY_HOST = "relay.fedsea.invalid"
"""The host name in every relay's certificate. Clients ask for it when they were told of a relay, and only then."""

_RELAY = "relay://"


def through_relay(address: str) -> bool:
    """Whether a relay is expected at this address; what goes through it is always sealed."""
    return address.startswith(_RELAY)


def tls_name(address: str) -> str:
    """The host name that the certificate at this address must have: every relay's, and no server's, has its own."""
    return RELAY_HOST if through_relay(address) else split_address(address)[0]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[ADDRESS]:PORT`, `relay://` before it or not.

    Raises:
        ConfigError: It has another form.
    """
    found = host_and_port(address.removeprefix(_RELAY).removeprefix("dns:///"))
    if found is None:
        raise ConfigError(
            f"{address[:120]!r} is not an address: write HOST:PORT, or [ADDRESS]:PORT for IPv6, with relay:// before "
            "it if TLS ends at a relay there."
        )
    if not 0 < found[1] < 65536:
        raise ConfigError(f"{address[:120]!r} has a port outside 1 to 65535: use the one that the server listens on.")
    return found


def host_and_port(text: str) -> tuple[str, int] | None:
    """The parts of `HOST:PORT` or `[ADDRESS]:PORT`, the host without brackets and the port whatever it is; else None.

    >>> host_and_port("h:1"), host_and_port("[::1]:70000"), host_and_port("::1:1")
    (('h', 1), ('::1', 70000), None)
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host and not bracketed) or not port.isascii() or not port.isdigit():
        return None
    return host, int(port)
