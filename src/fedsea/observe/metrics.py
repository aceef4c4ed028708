"""The server's Prometheus metrics: numbers by client-independent labels, on loopback unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.observe.snapshots import ServerSnapshot

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9464
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class ServerMetrics:
    """Gauges and counters of one server.

    Args:
        registry: Where they are registered; give every server in a process its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._step = Gauge("fedsea_step", "Steps applied", registry=registry)
        self._round = Gauge("fedsea_round", "Round under way", registry=registry)
        self._clients = Gauge("fedsea_clients_connected", "Clients connected", registry=registry)
        self._tokens = Counter("fedsea_tokens", "Target tokens trained on", registry=registry)
        self._bytes = Counter(
            "fedsea_bytes",
            "Frame bytes by direction (up: from clients) and kind of message",
            ("direction", "kind"),
            registry=registry,
        )
        self._step_seconds = Histogram(
            "fedsea_step_seconds", "Wall time from a step to the next", buckets=_STEP_BUCKETS, registry=registry
        )
        self._engine = Counter(
            "fedsea_engine_seconds", "Engine thread's busy time by phase", ("phase",), registry=registry
        )
        self._errors = Counter("fedsea_errors", "Errors by code", ("code",), registry=registry)
        self._sessions = Gauge("fedsea_inference_sessions", "Decoding sessions that are open", registry=registry)
        self._sequences = Gauge("fedsea_inference_sequences", "Sequences of these sessions", registry=registry)
        self._kv_bytes = Gauge("fedsea_inference_kv_bytes", "Memory set aside for keys and values", registry=registry)
        self._kv_limit = Gauge("fedsea_inference_kv_limit_bytes", "Memory that the plan allows", registry=registry)
        self._decoded = Counter("fedsea_inference_tokens", "New tokens, prompts' too", registry=registry)
        self._batches = Counter("fedsea_inference_batches", "Batches in which they ran", registry=registry)
        self._totals: dict[tuple[str, ...], float] = {}

    def update(self, snapshot: ServerSnapshot) -> None:
        """Take over where the run stands. Bytes come by kind, through `bytes`."""
        self._step.set(snapshot.step)
        self._round.set(snapshot.round)
        self._clients.set(len(snapshot.connected))
        self._tokens.inc(self._growth(("tokens",), snapshot.tokens))
        if (inference := snapshot.inference) is not None:
            self._sessions.set(inference.sessions)
            self._sequences.set(inference.sequences)
            self._kv_bytes.set(inference.kv_bytes)
            self._kv_limit.set(inference.kv_bytes_limit)
            self._decoded.inc(self._growth(("decoded",), inference.tokens))
            self._batches.inc(self._growth(("batches",), inference.batches))

    def bytes(self, direction: Literal["up", "down"], kind: str, total: int) -> None:
        """Bytes of a kind of message so far.

        Args:
            direction: "up" is from the clients to the server.
            kind: Class name of the message.
            total: Since the process began; a smaller total than before counts from zero again.
        """
        self._bytes.labels(direction, kind).inc(self._growth(("bytes", direction, kind), total))

    def step_seconds(self, seconds: float) -> None:
        """A step took so long."""
        self._step_seconds.observe(seconds)

    def engine_seconds(self, phase: str, total: float) -> None:
        """The engine thread has been busy so long with a phase, such as "forward", since the process began."""
        self._engine.labels(phase).inc(self._growth(("engine", phase), total))

    def errors(self, code: str, total: int) -> None:
        """So many sessions have ended with this `FedseaError.code` since the process began."""
        self._errors.labels(code).inc(self._growth(("errors", code), total))

    def _growth(self, key: tuple[str, ...], total: float) -> float:
        before = self._totals.get(key, 0.0)
        self._totals[key] = total
        return total - before if total >= before else total


@contextmanager
def serve_metrics(
    host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, registry: CollectorRegistry | None = None
) -> Iterator[ServerMetrics]:
    """Serve metrics over HTTP while the `with` block runs.

    Args:
        host: Name or address of this machine, IPv6 without brackets. There is no access control: listen on loopback, or
            behind your own.
        port: A free one.
        registry: A new one by default.

    Raises:
        ConfigError: The host is none, or the port is in use.
    """
    metrics = ServerMetrics(registry or CollectorRegistry())
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"Metrics cannot be served on port {port} of {host} ({error.strerror or 'no such address'}): choose "
            "another port or address with --metrics, or --metrics off."
        ) from None
    try:
        yield metrics
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
