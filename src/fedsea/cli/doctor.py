"""`fedsea doctor`: what stands in the way of taking part, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.cli.checks import Check

_MARKS = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}


def doctor(
    server: o.Server = None,
    identity: Annotated[
        Path | None, typer.Option(help="Folder of the identity; ./identity if it is there.", show_default=False)
    ] = None,
    model: o.Model = None,
    plan: Annotated[Path | None, typer.Option(metavar="TOML", help="A plan to check, as the operator.")] = None,
    settings: o.Settings = None,
    run: Annotated[Path, typer.Option(help="Where the run folder is going to be.")] = Path("runs"),
    as_json: o.Json = False,
) -> None:
    """Check this machine: versions, memory, disk, clock, identity, server, plan, base model.

    Needs nothing; with `--server` it also connects and checks the federation's plan, with `--plan` that file.
    Ends with exit code 1 if anything is in the way.

    Example: `fedsea doctor --server fedsea.example.org:7443 --model models/llama`
    """
    output.begin(as_json=as_json)
    with _told(silent=as_json) as say:
        checks = list(_checks(server, identity, model, plan, settings, run, say))
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        from dataclasses import asdict

        output.result({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _told(*, silent: bool) -> Iterator[Callable[[str], None]]:
    """What is looked at now, on a terminal: some checks load torch or ask the network, which takes seconds."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, transient=True) as live:
        yield lambda what: live.update(Spinner("dots", f"Looking at {what}"), refresh=True)


def _checks(
    server: str | None,
    identity: Path | None,
    model: str | None,
    plan: Path | None,
    settings: Path | None,
    run: Path,
    say: Callable[[str], None],
) -> Iterator[Check]:
    from fedsea.cli import checks as machine
    from fedsea.cli import federation_checks as federation
    from fedsea.cli.checks import attempt

    say("the packages")
    yield machine.python()
    yield from machine.packages()
    yield machine.machine()
    say("the GPU")
    yield machine.gpu()
    say("the disk")
    yield machine.disk(run)
    found = federation.Federation()
    folder = identity or Path("identity")
    if identity is not None or folder.is_dir() or plan is None:
        asked_for = identity is not None or server is not None
        say("the identity")
        yield from attempt("identity", lambda: federation.identity(folder, asked_for, found))
    if server is not None:
        say("the server")
        yield from attempt("server", lambda: federation.server(server, found))
    say("the plan")
    yield from attempt("plan", lambda: federation.plan(plan, server, settings, found))
    say("the base model")
    yield from attempt("model", lambda: federation.model(model, found))


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedsea.observe.terminal import with_fingerprints_in_halves

    console = Console()
    table = Table(box=None, padding=(0, 1), show_header=False)
    for check in checks:
        words = with_fingerprints_in_halves(check.found) if console.is_terminal else check.found
        found = Text(words, overflow="fold")
        if check.advice and check.state != "ok":
            found.append(f"\n→ {check.advice}", style="bold")
        elif check.advice:
            found.append(f" ({check.advice})", style="dim")
        table.add_row(_MARKS[check.state], check.name, found)
    console.print(table)
    counts = {state: sum(check.state == state for check in checks) for state in _MARKS}
    output.say(f"{counts['ok']} in order, {counts['warn']} to look at, {counts['fail']} in the way.")
