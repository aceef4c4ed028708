"""`fedsea audit`: what the server could read, attacked offline on the bytes that would be sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import options as o
from fedsea.cli import output
from fedsea.cli.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedsea.audit.outcome import AuditReport, Outcome

_ATTACKS = (
    "Only these, such as A1,A2. A0: what the public model guesses; A1: nearest hidden state; A2: with noise and prior; "
    "A3: learned inverter; A4: average over epochs; A5: labels from gradients; A6: alignment by known texts; "
    "A7: inversion of an update; A8: membership; A9: test of the noise; A10: answers from the server's own outputs."
)
_LEVELS = ("partial", "exposed", "inconclusive", "broken", "never")


def audit(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN_OR_RUN", help="A plan file, or a run folder of a client or of the server.")
    ],
    model: o.Model = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML",
            help="A client's own settings, beside a plan file: audited is the noise that this client adds.",
        ),
    ] = None,
    client: Annotated[str, typer.Option(help="Client of the plan; its first one if not given.")] = "",
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Own texts, beside the planted ones; they never leave this machine."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes on two cores for a small model.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="For attacks and curves: 30 if not given, 2.5 with --quick. A1, A5 and A10 always run; what does not "
            "fit is said."
        ),
    ] = None,
    attacks: Annotated[str, typer.Option(metavar="IDS", help=_ATTACKS)] = "",
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("audit"),
    seed: Annotated[int, typer.Option(min=0, help="Of planted texts, noise and attacks: same seed, same report.")] = 0,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    fail_on: Annotated[
        str,
        typer.Option(help="Least verdict with an exit code of its own: partial, inconclusive, exposed, broken, never."),
    ] = "partial",
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Attack what this plan sends, offline, and say what the server could read.

    Exit codes: 0 not recovered by these attacks, 20 partial, 21 exposed, 22 inconclusive, 23 the audit is broken.
    Answers count too, unless the plan has inference.enabled = false.

    Example: `fedsea audit plan.toml --quick --text notes.jsonl`
    """
    silent = output.begin(as_json=as_json, quiet=quiet)
    from fedsea.errors import ConfigError

    if fail_on not in _LEVELS:
        raise ConfigError(f"--fail-on {fail_on} is no verdict: choose one of {', '.join(_LEVELS)}.")
    _check_files(path, text or ())
    o.need_device(device)
    import torch

    from fedsea.audit.report import folder_for, write_report
    from fedsea.audit.run import audit as run
    from fedsea.audit.settings import AuditOptions

    if threads:
        torch.set_num_threads(threads)
    wanted = tuple(item.strip().upper() for item in attacks.split(",") if item.strip())
    options = AuditOptions(path, model, client, tuple(text or ()), quick, minutes, wanted, seed, device, settings)
    with folder_for(out):  # before the work, not after it
        with Parts(silent) as parts:
            report = run(options, parts)
        page = write_report(report, out)
    if as_json:
        output.result(report.to_json())
    else:
        _show(report)
        output.say(f"\nPlots, curves and reconstructed text: {page}")
    return _code(report, fail_on)


def _check_files(path: Path, texts: Sequence[Path]) -> None:
    """What can be said before torch is loaded."""
    from fedsea.plan import load_plan

    for text in texts:
        o.need_file(text, "--text")
    if not path.is_dir():
        load_plan(path)


def _code(report: AuditReport, fail_on: str) -> int:
    """The verdict's exit code, or 0 below the level that is asked for."""
    from fedsea.audit.verdict import Verdict

    if fail_on == "never":
        return 0
    order = list(Verdict)
    least = Verdict[fail_on.upper()]
    return report.verdict.exit_code if order.index(report.verdict) >= order.index(least) else 0


def _show(report: AuditReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedsea.audit.report import HEADINGS, NOT_IN_USE, row_of

    console = Console()
    # What an attack says in words is too long for a column here; the page has it there.
    table = Table(*HEADINGS[:5], "identifiers", HEADINGS[6], title="What the server could read")
    words = []
    for outcome in report.outcomes:
        if outcome.status == "run":
            row = row_of(outcome)
            if outcome.score is None and row[5]:
                words.append(f"{outcome.attack.id}: {row[5]}")
                row[5] = ""
            table.add_row(*row)
    console.print(table)
    not_in_use = [NOT_IN_USE] if report.about.get("sessions") else []
    for line in (*words, *not_in_use, *_left_out(report.outcomes)):
        output.say(line)
    costs = Table("perplexity without the defence", "with it", "of the client alone")
    costs.add_row(*(f"{report.perplexity[key]:.2f}" for key in ("without_defence", "with_defence", "client_alone")))
    console.print(costs)
    for line in (
        report.statement,
        f"Audited: {report.about['audited']}.",
        f"The attacker has: {report.about['attacker_model']}.",
        report.claim,
        f"Verdict: {report.verdict.value}",
        *report.sentences,
    ):
        output.say(line)


def _left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """Attacks that had no reason to run, by reason; the report's sentences name all others that did not run."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status in ("not needed", "not applicable"):
            about = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
            reasons.setdefault(about, []).append(outcome.name)
    return [f"{', '.join(ids)} {about}." for about, ids in reasons.items()]
