"""`fedsea ledger`: what was released, what it spent, and what may be claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedsea.cli import options as o
from fedsea.cli import output


def ledger(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder of a client, or the folder of its identity.")
    ] = Path("runs/client"),
    as_json: o.Json = False,
) -> None:
    """Show what a client has released under a plan: how often, how much of the budget it spent, what is left.

    Training, evaluation and every use of the model with one identity add up. Where no (epsilon, delta) can be claimed,
    the reason stands instead.

    Example: `fedsea ledger runs/clinic`
    """
    output.begin(as_json=as_json)
    from fedsea.errors import ConfigError

    if not run.is_dir():
        raise ConfigError(f"There is no folder {run}: give the run folder of `fedsea train`, or the identity's folder.")
    _check_there(run)
    from fedsea.client.accounts import reports

    found = reports(run)
    if as_json:
        output.result({"ledgers": found})
    else:
        for report in found:
            _show(report)


def _check_there(run: Path) -> None:
    """A run whose ledger is gone, and a server's run, are told apart from a folder without anything."""
    from fedsea.client.accounts import find_ledgers
    from fedsea.errors import ConfigError, StorageError
    from fedsea.storage import CheckpointStore

    found = find_ledgers(run)
    for folder in found:
        if not folder.is_dir():
            raise StorageError(
                f"What this run has released was charged to the privacy ledger in {folder}, which is missing. Put the "
                "newest copy of that folder in its place, whole; without it nobody knows what was spent."
            )
    if not found and (run / "rounds").is_dir():
        latest = CheckpointStore(run / "checkpoints", read_only=True).latest()
        if latest is not None and "rounds_done" in latest[2]:
            raise ConfigError(
                f"{run} is a server's run folder, and a server has no ledger: ask the client, whose run folder or "
                "identity has one."
            )


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_row("client", f"{report['client']} (plan {report['plan']}, {report['plan_sha256'][:12]})")
    facts.add_row("trust mode", report["trust_mode"])
    facts.add_row("backward channel", report["backward_channel"])
    facts.add_row("budget", _budget(report))
    rows = Table("channel", "purpose", "releases", "mu", f"epsilon at delta = {report['delta']:g}", "unit")
    for row in report["rows"]:
        rows.add_row(
            row["channel"],
            row["purpose"],
            str(row["releases"]),
            _number(row["mu"]),
            _number(row["epsilon"]),
            row["unit"],
        )
    if report["mu"] is not None and report["rows"]:
        rows.add_row("all", "", "", _number(report["mu"]), _number(report["epsilon"]), report["unit"])
    console = Console()
    console.print(facts)
    if report["rows"]:
        console.print(rows)
    console.print(report["sentence"], soft_wrap=not console.is_terminal, highlight=False)


def _budget(report: dict[str, Any]) -> str:
    if report["budget"] is None:
        return "none"
    budget = f"epsilon = {report['budget']:g}"
    if report["mu"] is None:
        return budget
    from fedsea.privacy.accountant import mu_of

    spent = (report["mu"] / mu_of(report["budget"], report["delta"])) ** 2
    return f"{budget}, {100 * spent:.4g} % of it spent (in squares of mu, which add up; epsilons do not)"


def _number(value: float | None) -> str:
    return "no claim" if value is None else f"{value:.4g}"
