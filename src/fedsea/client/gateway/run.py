"""`serve`, the whole of `fedsea gateway`; and `Gateway`, for programs that run one beside other things."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from fedsea.client.drafters import Drafter
from fedsea.client.gateway.app import Served, build
from fedsea.client.gateway.guard import Guard, bound, check_host
from fedsea.client.gateway.metrics import GatewayMetrics
from fedsea.client.gateway.pieces import Pieces
from fedsea.client.gateway.work import Means, Workers
from fedsea.client.inference import OpenedDecoder, open_decoder
from fedsea.client.setup import ClientOptions, unsaid
from fedsea.errors import FedseaError

_GRACE_S = 5
"""How long answers under way may take to end when the gateway stops; they are cancelled first."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How a gateway serves.

    Attributes:
        host: Where it listens; another than loopback needs a key.
        port: 0 takes a free one.
        api_key: What clients must present; None lets any program on this machine in.
        model_name: How clients name the model; None takes the federation's name.
        most_running: Choices generated at once, each by a thread of its own.
        most_waiting: Choices that wait for a thread; more are refused with 429.
        max_body_bytes: Largest body of a request.
        default_new_tokens: Longest answer of a chat that asks for no length.
        first_s: How long a request may wait for its first text.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    model_name: str | None = None
    most_running: int = 32
    most_waiting: int = 128
    max_body_bytes: int = 4 << 20
    default_new_tokens: int = 1024
    first_s: float = 300.0


def serve(
    options: ClientOptions,
    settings: GatewaySettings,
    *,
    base: bool = False,
    drafter: Callable[[OpenedDecoder], Drafter | None] = lambda _: None,
    until: threading.Event,
    on_ready: Callable[[Gateway], None] = lambda _: None,
    tell: Callable[[str], None] = unsaid,
) -> None:
    """Open the federation's model and serve it.

    Args:
        options: As for `fedsea.client.inference.open_decoder`.
        settings: How to serve.
        base: As for `open_decoder`.
        drafter: Given the opened model, what drafts for every choice; None: no speculation.
        until: Ends it in good order.
        on_ready: Called when requests are answered.
        tell: As for `open_decoder`.

    Raises:
        ConfigError: The address cannot be used, or as for `open_decoder`.
        FedseaError: The federation's server cannot be reached, or was lost for good.
    """
    check_host(settings.host, settings.api_key)
    listening = bound(settings.host, settings.port)
    with listening as listener, open_decoder(options, base=base, tell=tell) as opened:
        with Gateway(opened, settings, drafter(opened), listener=listener, stopped=until) as gateway:
            on_ready(gateway)
            until.wait()
        if gateway.error is not None:
            raise gateway.error


class Gateway:
    """A gateway on a thread of its own. Use as a context manager.

    Args:
        opened: The model.
        settings: How to serve.
        drafter: Drafts for every choice; None: no speculation.
        listener: A socket that is bound already; None binds one.
        stopped: Set when the federation's server is lost for good.

    Attributes:
        url: What applications take as `base_url`.
        error: Why the server is lost for good, or None.
        workers: The threads that generate.

    Raises:
        ConfigError: The address cannot be used.
    """

    def __init__(
        self,
        opened: OpenedDecoder,
        settings: GatewaySettings,
        drafter: Drafter | None = None,
        *,
        listener: socket.socket | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        check_host(settings.host, settings.api_key)
        decoder = opened.decoder
        self.error: FedseaError | None = None
        self.metrics = GatewayMetrics()
        self.name = settings.model_name or opened.plan.name
        most = min(settings.most_running, opened.plan.inference.max_sequences)
        means = Means(decoder, opened.tokenizer, Pieces(opened.tokenizer), self.metrics, drafter)
        self.workers = Workers(means, most, settings.most_waiting)
        self._trunk = opened.trunk
        self._stopped = stopped or threading.Event()
        self._listener = listener or bound(settings.host, settings.port)
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        served = Served(
            name=self.name,
            created=int(time.time()),
            vocab_size=decoder.vocab_size,
            max_tokens=decoder.max_tokens,
            default_new_tokens=settings.default_new_tokens,
            stop_tokens=opened.stop_tokens,
            max_body_bytes=settings.max_body_bytes,
            first_s=settings.first_s,
            prompts=opened.prompts,
            workers=self.workers,
            guard=Guard(settings.api_key),
            metrics=self.metrics,
            connected=self._connected,
        )
        config = uvicorn.Config(
            build(served),
            log_config=None,  # an access log would name hosts, and belongs to whoever runs a proxy
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._work, name="fedsea-http", daemon=True)

    def __enter__(self) -> Gateway:
        if hasattr(self._trunk, "connected"):  # one in this process is never lost, and never waits for an event
            threading.Thread(target=self._watch, name="fedsea-gateway-watch", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.workers:
            self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def _work(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except Exception as error:  # noqa: BLE001 (this thread's last word)
            self.error = FedseaError(f"The HTTP server ended for a reason of its own ({type(error).__name__}).")
            self._stopped.set()

    def _watch(self) -> None:
        """Wait for the end of the connection; a trunk says nothing else to whoever only decodes."""
        try:
            while True:
                self._trunk.next_event()
        except FedseaError as error:
            self.error = error
            self._stopped.set()

    def _connected(self) -> bool:
        return self.error is None and bool(getattr(self._trunk, "connected", True))
