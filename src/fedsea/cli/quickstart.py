"""`fedsea quickstart`: a whole federation on this machine, in a few minutes."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import answering, output
from fedsea.cli import options as o
from fedsea.cli.loading import Loading
from fedsea.cli.parts import Parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedsea.audit.quick import LeftOut, QuickTable, TableRow
    from fedsea.evaluation.processes import Processes
    from fedsea.evaluation.quickstart import QuickstartOptions, QuickstartResult
    from fedsea.evaluation.report import Cells

_TITLE_WIDTH = 44

_AUDIT, _AUDIT_S = "audit", 600.0
"""The process that audits, and how long it is waited for at the end."""

_NO_DEFENCE = "trusted-server"
_LEGEND = "A1: the nearest hidden state. A2: with the noise and the model's prior. A5: labels from gradients."


def quickstart(
    folder: Annotated[Path, typer.Option(help="Gets authority, plan, runs, logs and report; must be new.")] = Path(
        "fedsea-quickstart"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the shipped plan's if not given.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """See a federation work: an authority, a server and three clients on this machine, and what they gain.

    Needs nothing but the package: a small model and three invented silos come with it. Up to nine processes run at
    once: have two cores free and 3 GB of memory, and it takes two to three minutes; where others use the cores, longer.

    Example: `fedsea quickstart`
    """
    silent = output.begin(as_json=as_json, quiet=quiet, kept=f"Remove {folder} before you start again.")
    from fedsea.storage import check_new_folder

    check_new_folder(folder, "--folder")
    from fedsea.evaluation.quickstart import QuickstartOptions, run

    options, reading = QuickstartOptions(folder, steps), _Reading(folder)
    with Parts(silent) as parts:
        if as_json:
            _as_document(options, parts, reading)
            return

        def present(found: QuickstartResult) -> None:
            parts.done()
            _show(found)

        def audit(found: QuickstartResult) -> Cells:
            _show_end(found)
            with Loading(silent) as loading:
                loading("attacking planted notes, sent as the clinic sends its text")
                table = reading.table()
            _show_audit(table, folder)
            return _cells(table)

        found = run(options, parts, present, _Indented(), audit, reading.begin)
    output.say(f"\nPlots and details: {found.report}")
    output.say(f"From its start to here the quickstart took {found.seconds['all']:.1f} s.")
    output.say(
        f"Try next: look into {folder}/plan.toml, then `fedsea init my-federation --model {folder}/model` for one of "
        "your own."
    )


def _as_document(options: QuickstartOptions, parts: Parts, reading: _Reading) -> None:
    from fedsea.evaluation.quickstart import run

    tables: list[QuickTable] = []

    def audit(_: QuickstartResult) -> Cells:
        tables.append(reading.table())
        return _cells(tables[0])

    result = run(options, parts, audit=audit, begun=reading.begin)
    document = json.loads(result.to_json())
    output.result(document | _audit_document(tables[0]))


class _Reading:
    """What the server could have read: a table that a process of its own makes while the models train.

    Args:
        folder: The quickstart's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: Processes | None = None

    def begin(self, processes: Processes) -> None:
        """Plan and model are there: start that process."""
        self._processes = processes
        processes.call(_AUDIT, _print_audit, str(self._folder.resolve()))

    def table(self) -> QuickTable:
        """The table, when it is done; made here if there is no process for it."""
        if self._processes is None:
            return _audited(self._folder)
        from fedsea.audit.quick import LeftOut, QuickTable, TableRow

        document = json.loads(self._processes.last_line(_AUDIT, timeout_s=_AUDIT_S))
        rows, left = ([*document[key]] for key in ("audit", "audit_left_out"))
        return QuickTable(tuple(TableRow(**row) for row in rows), tuple(LeftOut(**one) for one in left))


def _print_audit(folder: str) -> None:
    output.result(_audit_document(_audited(Path(folder))))


def _audited(folder: Path) -> QuickTable:
    """What this server could have read of notes with planted identifiers, had a client sent them."""
    from fedsea.audit.quick import quick_table
    from fedsea.plan import load_plan

    # By its own clock: other processes use the cores, too, which says nothing of how slow the machine is.
    return quick_table(load_plan(folder / "plan.toml"), folder / "model", now=time.process_time)


def _audit_document(found: QuickTable) -> dict[str, Any]:
    return {"audit": [row.to_json() for row in found.rows], "audit_left_out": [one.to_json() for one in found.left_out]}


def _cells(found: QuickTable) -> Cells:
    """The table as text, for the terminal and for the page."""
    rows = [("defence", "channel", "tokens recovered", "by guessing", "identifiers")]
    for row in found.rows:
        recovered, guessed, identifiers = (
            f"{100 * value:.0f} %" for value in (row.recovery, row.prior, row.identifiers)
        )
        channel = f"{_channel(row)} ({row.attack})"
        rows.append((row.defence, channel, recovered, guessed, identifiers))
    rows += [(left.defence, _channel(left), f"left out: {left.why}", "", "") for left in found.left_out]
    return rows


def _channel(row: TableRow | LeftOut) -> str:
    """The noise in a defence's name is on the hidden states alone, which has to be said beside the gradients."""
    return f"{row.channel}, no noise" if row.channel == "gradient" and row.defence != _NO_DEFENCE else row.channel


def _show_audit(found: QuickTable, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    heading, *rows = _cells(found)
    table = Table(*heading, title="What the server could have read: planted notes, sent as the clinic sends")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    output.say(_LEGEND)
    output.say(f"The whole audit: fedsea audit {folder}/plan.toml --quick")


class _Indented:
    """Shows an answer as it comes, set in from the left."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, piece: str) -> None:
        if not self._begun:
            piece, self._begun = f"    {piece.lstrip()}", bool(piece.strip())
        if self._begun:
            answering.show(piece.replace("\n", "\n    "))


def _show(found: QuickstartResult) -> None:
    from rich.console import Console

    from fedsea.evaluation.report import in_words

    console = Console()
    console.print(_losses(found))
    output.say(in_words(found) + "\n")
    _show_costs(console, found)
    asked = "A program at the clinic asks the federation's model through `fedsea gateway`:"
    if found.sample["through"] == "process":
        asked = 'The federation\'s model is asked (with `pip install ".[gateway]"` programs at a client can do so):'
    output.say(f"\n{asked}\n")
    output.say(textwrap.indent(found.sample["prompt"].strip(), "    "))
    output.say("\nAnd this is what it writes:\n")


def _show_end(found: QuickstartResult) -> None:
    """What stands below the answer."""
    from fedsea.evaluation.report import cut_off

    remark = cut_off(found)
    output.say(f" …\n\n    {remark}\n" if remark else "\n")


def _losses(found: QuickstartResult) -> Table:
    from rich.table import Table

    from fedsea.evaluation.report import loss_rows

    silos = list(found.by_silo["base"])
    table = Table("model", "all silos", *silos, title="Validation loss (nats per token; lower is better)")
    for model, pooled, by_silo in loss_rows(found):
        style = "bold" if model == "federated" else ""
        table.add_row(model, f"{pooled:.4f}", *(f"{by_silo[silo]:.4f}" for silo in silos), style=style)
    return table


def _show_costs(console: Console, found: QuickstartResult) -> None:
    from rich.table import Table

    from fedsea.evaluation.report import phase_rows, time_rows, traffic_rows
    from fedsea.observe.figures import bytes_text

    traffic = Table("content", "bytes", title="What travelled, summed over the clients", min_width=_TITLE_WIDTH)
    for what, count in traffic_rows(found.bytes_by_kind):
        traffic.add_row(what, bytes_text(count))
    times = Table("part", "seconds", title="Where the time went", min_width=_TITLE_WIDTH)
    for part, seconds in time_rows(found.seconds):
        times.add_row(part, f"{seconds:.1f}")
    phases = Table("phase of a step", "seconds", title="Of it, summed over the clients' steps", min_width=_TITLE_WIDTH)
    for phase, seconds in phase_rows(found.phases_s):
        phases.add_row(phase, f"{seconds:.1f}")
    for table in (traffic, times, phases):
        console.print(table)
