"""`fedsea server`: runs the trunk."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.observe.metrics import ServerMetrics

log = logging.getLogger(__name__)


def _check_form(listen: str) -> str:
    from fedsea.wire.listening import split_listen

    split_listen(listen)
    return listen


def _check_metrics(asked: str | None) -> str | None:
    if asked not in (None, "off"):
        _split_metrics(asked)
    return asked


def _split_metrics(asked: str) -> tuple[str, int]:
    from fedsea.wire.listening import split_listen

    return split_listen(asked, "for metrics", "127.0.0.1:9464")


def server(
    plan: Annotated[Path, typer.Option(metavar="TOML", help="The federation's plan, see `fedsea init`.")] = Path(
        "plan.toml"
    ),
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", callback=_check_form, help="Where clients connect; port 0 takes a free one."),
    ] = ("0.0.0.0:7443"),
    identity: Annotated[
        Path | None, typer.Option(help="Folder of the server's identity; CA/server if not given.")
    ] = None,
    ca: Annotated[Path, typer.Option(help="The authority's folder, made by `fedsea ca init`.")] = Path("ca"),
    run: Annotated[Path, typer.Option(help="Run folder; the same command goes on from what is in it.")] = Path(
        "runs/server"
    ),
    threads: o.Threads = None,
    device: o.Device = "cpu",
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=_check_metrics,
            help="Prometheus metrics; 127.0.0.1:9464 if not given and free; `off` serves none.",
        ),
    ] = None,
    exit_when_finished: Annotated[
        bool, typer.Option("--exit-when-finished", help="End when the run is over and every client has left.")
    ] = False,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Gets HOST:PORT as soon as clients may connect.")
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Serve the trunk to the clients of a plan.

    Needs the plan, the authority and the server's identity (`fedsea ca init` makes both), and the base model.
    Ctrl-C or SIGTERM ends it in good order; stopped or killed, the same command goes on.

    Example: `fedsea server --plan plan.toml --listen 0.0.0.0:7443 --run runs/server`
    """
    silent = output.begin(
        as_json=as_json, quiet=quiet, kept=f"The run is kept in {run}: the same command goes on from there."
    )
    from fedsea.observe.progress import ServerDisplay
    from fedsea.observe.recorders import ServerRecorder
    from fedsea.plan import load_plan
    from fedsea.wire.listening import check_listen

    # before torch is loaded: what cannot be used is refused at once
    display = ServerDisplay(load_plan(plan), quiet=silent)
    check_listen(listen)
    o.need_device(device)
    o.need_identity(identity or ca / "server", "server")
    log.info("starting: loading torch, which takes some seconds")
    from fedsea.server.run import ServerOptions, serve

    options = ServerOptions(
        plan=plan,
        listen=listen,
        identity=identity or ca / "server",
        ca=ca,
        run=run,
        threads=threads,
        device=device,
        exit_when_finished=exit_when_finished,
        ready_file=ready_file,
    )
    with contextlib.ExitStack() as stack:
        endpoint = _serve_metrics(metrics, stack)
        recorder = stack.enter_context(ServerRecorder(run, display, endpoint))
        stack.enter_context(display)
        serve(options, recorder)
    last = recorder.last
    summary: dict[str, Any] = {"run": str(run)}
    if last is not None:
        summary |= {"next_step": last.step, "num_steps": last.num_steps}
        summary |= {"bytes_received": last.bytes_up, "bytes_sent": last.bytes_down}
    if as_json:
        output.result(summary)
    elif not quiet and last is not None:
        output.say(f"Stopped after {last.step} of {last.num_steps} steps. Everything is in {run}.")


def _serve_metrics(asked: str | None, stack: contextlib.ExitStack) -> ServerMetrics | None:
    """The endpoint; a default that is in use by another server stops nobody."""
    if asked == "off":
        return None
    from fedsea.errors import ConfigError
    from fedsea.observe.metrics import serve_metrics

    try:
        return stack.enter_context(serve_metrics(*(_split_metrics(asked) if asked else ())))
    except ConfigError as error:
        if asked is not None:
            raise
        log.warning("%s The run goes on without metrics.", error.message)
        return None
