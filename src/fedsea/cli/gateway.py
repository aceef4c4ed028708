"""`fedsea gateway`: an OpenAI-compatible server for the applications of this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import answering as a
from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.client.gateway.run import Gateway


def gateway(
    server: o.Server = None,
    identity: o.Identity = Path("identity"),
    run: a.Run = Path("runs/client"),
    base: a.Base = False,
    model: o.Model = None,
    settings: o.Settings = None,
    host: Annotated[
        str, typer.Option(help="Where applications connect; other hosts than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FEDSEA_API_KEY",
            metavar="KEY",
            show_envvar=False,
            help="What applications must present; better in FEDSEA_API_KEY, which others on this machine cannot see.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="How applications name the model; the federation's name if not given.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are generated at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Answers that wait for their turn; more get status 429.")] = 128,
    max_body: Annotated[int, typer.Option(metavar="MIB", min=1, help="Largest body of a request.")] = 4,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of a chat that asks for no length.")
    ] = 1024,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="How long a request may wait for its first text.")
    ] = 300.0,
    drafter: a.DrafterName = "prompt-lookup",
    threads: o.Threads = None,
    device: o.Device = "cpu",
    retry_for: o.RetryFor = 600.0,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Gets the base URL as soon as requests are answered.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Serve the federation's model to applications that speak OpenAI's API.

    They use `http://127.0.0.1:8080/v1` as base URL. Prompts and answers stay on this machine, but the federation's
    server can reconstruct them from what it receives, as in training. Ctrl-C or SIGTERM ends it in good order. Needs
    `pip install ".[gateway]"` in the folder of fedsea's source.

    Example: `fedsea gateway --server fedsea.example.org:7443 --run runs/clinic --port 8080`
    """
    output.begin(as_json=as_json)
    a.check_drafter(drafter)
    _check_host(host, api_key, port)
    address = o.need_server(server)
    if not base:
        o.need_run(run)
    options = o.client_options(
        address,
        identity,
        run=run,
        model=model,
        settings=settings,
        threads=threads,
        device=device,
        retry_for=retry_for,
    )
    until = threading.Event()
    from fedsea.cli.loading import LIBRARIES, Loading
    from fedsea.storage import write_bytes_atomic

    def ready(gateway: Gateway) -> None:
        loading.done()
        _end_in_good_order(until)
        if ready_file is not None:
            write_bytes_atomic(ready_file, gateway.url.encode())
        if as_json:
            output.result({"base_url": gateway.url, "model": gateway.name})
        else:
            output.say(f"Serving {gateway.name} at {gateway.url}")

    with Loading(as_json) as loading:
        loading(LIBRARIES)
        from fedsea.client.gateway import run as run_module

        chosen = run_module.GatewaySettings(
            host=host,
            port=port,
            api_key=api_key,
            model_name=name,
            most_running=concurrency,
            most_waiting=queue,
            max_body_bytes=max_body << 20,
            default_new_tokens=max_new_tokens,
            first_s=wait,
        )
        run_module.serve(
            options,
            chosen,
            base=base,
            drafter=lambda opened: a.pick_drafter(drafter, opened),
            until=until,
            on_ready=ready,
            tell=loading,
        )


def _check_host(host: str, api_key: str | None, port: int) -> None:
    """Whether the packages are there, whether a key is needed, and whether the port is free.

    Raises:
        ConfigError: Says what is missing.
    """
    from fedsea.errors import ConfigError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        sentence = 'The gateway needs more packages: pip install ".[gateway]" in the folder of the source.'
        raise ConfigError(sentence) from None
    from fedsea.client.gateway.guard import bound, check_host

    check_host(host, api_key)
    bound(host, port).close()


def _end_in_good_order(until: threading.Event) -> None:
    """From now on Ctrl-C and SIGTERM end the service; before, they end the command."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: until.set())
