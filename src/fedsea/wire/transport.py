"""What both ends of a connection set alike: method names, gRPC options, deadlines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc.aio

from fedsea.wire.limits import MAX_CHUNK_BYTES

aio: Any = grpc.aio
"""gRPC has no types of its own."""

SERVICE = "fedsea.Wire"
SESSION = f"/{SERVICE}/Session"
STATUS = f"/{SERVICE}/Status"
RENEW = f"/{SERVICE}/Renew"

ADMITTED = "fedsea-admitted"
"""Key of the metadata with which the server lets a stream in."""

SEALED = "fedsea-sealed"
"""Key of the metadata with which the server says that the stream begins with a sealed handshake."""

LAST_WORD = "fedsea-last-word-bin"
"""Key of the trailing metadata that says, sealed, why the server ended a sealed stream."""

Option = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of a connection.

    Attributes:
        keepalive_s: Time without traffic after which a ping asks whether the peer is still there.
        keepalive_timeout_s: Time that it has to answer; then the connection counts as broken.
        send_timeout_s: Longest time that the network may take to accept one chunk; then the peer counts as stuck.
        check_s: How often the server asks the gate again whether a live peer may stay.
        close_s: Time that an orderly end may take.
        alive_s: Time without anything of ours after which a sealed stream says that this end is alive.
        silence_s: Longest time without anything of the other end's of a sealed stream.
        renew_every_s: Shortest time between two requests of a peer for a new certificate: each costs a signature.
    """

    keepalive_s: float = 15.0
    keepalive_timeout_s: float = 10.0
    send_timeout_s: float = 120.0
    check_s: float = 1.0
    close_s: float = 5.0
    alive_s: float = 15.0
    silence_s: float = 150.0
    renew_every_s: float = 10.0


DEFAULT_TIMING = Timing()


def _common(timing: Timing) -> list[Option]:
    return [
        ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
        ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
        ("grpc.keepalive_time_ms", int(timing.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(timing.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(timing: Timing, *, proxy: bool) -> list[Option | tuple[str, str]]:
    """Of a channel; each has connections of its own, so that a reconnect does not inherit another's backoff."""
    return [
        *_common(timing),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", int(proxy)),
    ]


def server_options(timing: Timing) -> list[Option]:
    """Of a server; a second server on the same port is refused instead of sharing it."""
    return [
        *_common(timing),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", 16),
        ("grpc.server_handshake_timeout_ms", 15000),
    ]
