"""The gateway's Prometheus metrics: numbers by route and status, nothing about anybody's text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fedsea.client.generation import GenerationStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TOKENS_PER_S = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class GatewayMetrics:
    """Gauges and counters of one gateway."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fedsea_gateway_requests", "Requests by route and status", ("route", "status"), registry=registry
        )
        self.running = Gauge("fedsea_gateway_running", "Choices being generated", registry=registry)
        self.waiting = Gauge("fedsea_gateway_waiting", "Choices waiting for a thread", registry=registry)
        self._cancelled = Counter(
            "fedsea_gateway_cancelled", "Choices that were given up because nobody waited any more", registry=registry
        )
        self._tokens = Counter("fedsea_gateway_tokens", "Tokens by kind", ("kind",), registry=registry)
        self._trips = Counter("fedsea_gateway_round_trips", "Round trips to the server", registry=registry)
        self._first = Histogram(
            "fedsea_gateway_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=registry
        )
        self._rate = Histogram(
            "fedsea_gateway_tokens_per_second", "Rate of a choice", buckets=_TOKENS_PER_S, registry=registry
        )

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def cancelled(self) -> None:
        """A choice was given up."""
        self._cancelled.inc()

    def generated(self, stats: GenerationStats) -> None:
        """A choice is done."""
        for kind, count in (
            ("prompt", stats.prompt_tokens),
            ("new", stats.new_tokens),
            ("drafted", stats.drafted),
            ("accepted", stats.accepted),
        ):
            self._tokens.labels(kind).inc(count)
        self._trips.inc(stats.round_trips)
        if stats.new_tokens:
            self._first.observe(stats.first_token_s)
            self._rate.observe(stats.tokens_per_s)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
