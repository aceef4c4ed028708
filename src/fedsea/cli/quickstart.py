"""`fedsea quickstart`: a whole federation on this machine, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from fedsea.evaluation.quickstart import QuickstartResult

_SMALL_SHARE = 0.001
"""Kinds of messages below this share of all bytes are shown as one."""
_TITLE_WIDTH = 38


def quickstart(
    folder: Annotated[Path, typer.Option(help="Gets authority, plan, runs, logs and report; must be new.")] = Path(
        "fedsea-quickstart"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the shipped plan's if not given.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """See a federation work: an authority, a server and three clients on this machine, and what they gain.

    Needs nothing but the package: a small model and three invented silos come with it. Takes about three minutes.

    Example: `fedsea quickstart`
    """
    silent = output.begin(as_json=as_json, quiet=quiet, kept=f"Remove {folder} before you start again.")
    from fedsea.evaluation.quickstart import QuickstartOptions, run

    with _Parts(silent) as parts:
        found = run(QuickstartOptions(folder, steps), parts)
    if as_json:
        output.say(found.to_json())
    else:
        _show(found, folder)


class _Parts:
    """How far each part is: bars on a terminal, else a line when a part is done."""

    def __init__(self, silent: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._lines = not silent and not console.is_terminal
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._done: set[str] = set()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, disable=silent or not console.is_terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)
        if self._lines and done >= total and what not in self._done:
            self._done.add(what)
            self._console.print(f"{what}: done ({total})", markup=False, highlight=False)


def _show(found: QuickstartResult, folder: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_losses(found))
    _show_costs(console, found)
    console.print(
        f"\nThe federation's model was asked ({found.sample['prompt'].strip()!r}) and answered:", markup=False
    )
    console.print(f"  {found.sample['answer'].strip()}", markup=False, highlight=False)
    console.print(f"\nPlots and details: {found.report}", markup=False, highlight=False)
    console.print(
        f"Try next: look into {folder}/plan.toml, then `fedsea init my-federation` for one of your own.",
        markup=False,
        highlight=False,
    )


def _losses(found: QuickstartResult) -> Table:
    from rich.table import Table

    silos = list(found.by_silo["base"])
    table = Table("model", "all silos", *silos, title="Validation loss (nats per token; lower is better)")
    for model, by_silo in found.by_silo.items():
        alone = found.val_loss["alone"]
        pooled = alone[model] if model in alone else found.val_loss[model]
        label = f"{model} alone" if model in alone else model
        style = "bold" if model == "federated" else ""
        table.add_row(label, f"{pooled:.4f}", *(f"{by_silo[silo]:.4f}" for silo in silos), style=style)
    return table


def _show_costs(console: Console, found: QuickstartResult) -> None:
    from rich.table import Table

    from fedsea.observe.figures import bytes_text

    total = sum(found.bytes_by_kind.values())
    shown = {kind: count for kind, count in found.bytes_by_kind.items() if count >= _SMALL_SHARE * total}
    traffic = Table("message", "bytes", title="What crossed the wire, all clients", min_width=_TITLE_WIDTH)
    for kind, count in sorted(shown.items(), key=lambda item: -item[1]):
        traffic.add_row(kind, bytes_text(count))
    traffic.add_row("everything else", bytes_text(total - sum(shown.values())))
    times = Table("part", "seconds", title="Where the time went", min_width=_TITLE_WIDTH)
    for part, seconds in found.seconds.items():
        times.add_row(part, f"{seconds:.1f}")
    for phase, seconds in found.phases_s.items():
        times.add_row(f"clients: {phase}", f"{seconds:.1f}")
    console.print(traffic)
    console.print(times)
