"""`fedsea audit`: what the server could read, attacked offline on the bytes that would be sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import options as o
from fedsea.cli import output
from fedsea.cli.loading import LIBRARIES, Loading
from fedsea.cli.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedsea.audit.outcome import AuditReport, Outcome
    from fedsea.audit.scoring import Score
    from fedsea.audit.settings import AuditOptions

_ATTACKS = (
    "Only these, such as A1,A2. A0: what the public model guesses; A1: nearest hidden state; A2: with noise and prior; "
    "A3: learned inverter; A4: average over epochs; A5: labels from gradients; A6: alignment by known texts; "
    "A7: inversion of an update; A8: membership; A9: test of the noise; A10: answers from the server's own outputs."
)
_COLUMNS = {"attack": 11, "tokens\nrecovered": 9, "prior": 5, "excess": 6, "identifiers": 17, "verdict": 13}
"""Headings of the table and their least widths: 80 columns with what is between them."""
_FIGURES = ("recovery", "prior", "excess")
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
            help="For the audit's own check, attacks and curves: 30 if not given, 2.5 with --quick. A1, A5 and A10 "
            "always run; what does not fit is said."
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
    silent = output.begin(as_json=as_json, quiet=quiet, kept="Nothing was written.")
    from fedsea.errors import ConfigError

    if fail_on not in _LEVELS:
        raise ConfigError(f"--fail-on {fail_on} is no verdict: choose one of {', '.join(_LEVELS)}.")
    from fedsea.audit.settings import AuditOptions

    wanted = tuple(item.strip().upper() for item in attacks.split(",") if item.strip())
    options = AuditOptions(path, model, client, tuple(text or ()), quick, minutes, wanted, seed, device, settings)
    _check_files(options)
    o.need_device(device)
    with Loading(silent) as loading:
        loading(LIBRARIES)
        import torch

        from fedsea.audit.report import folder_for, write_report
        from fedsea.audit.run import audit as run

    if threads:
        torch.set_num_threads(threads)
    with folder_for(out):  # before the work, not after it
        with Parts(silent) as parts:
            report = run(options, parts)
        output.current.kept = ""
        page = write_report(report, out)
    output.current.kept = f"The report is in {out}."
    if as_json:
        output.result(report.to_json())
    else:
        _show(report)
        output.say(f"\nPlots, curves and reconstructed text: {page}")
    return _code(report, fail_on)


def _check_files(options: AuditOptions) -> None:
    """What can be said before torch is loaded."""
    from fedsea.errors import ConfigError
    from fedsea.plan import load_plan, load_settings

    path = options.path
    for text in options.texts:
        o.need_file(text, "--text")
    if not path.exists():
        raise ConfigError(f"There is no file {path}, and no folder of that name: give a plan file or a run folder.")
    if not path.is_dir():
        load_plan(path)
    if options.settings is not None:
        load_settings(options.settings)


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

    from fedsea.audit.report import NOT_IN_USE

    console = Console()
    table = Table(title="What the server could read, in %", caption="Each attack in words: fedsea audit --help")
    for heading, width in _COLUMNS.items():
        table.add_column(heading, min_width=width, no_wrap=heading != "verdict")
    done = [outcome for outcome in report.outcomes if outcome.status == "run"]
    for outcome in done:
        for row in _rows(outcome):
            table.add_row(*row)
    console.print(table)
    # What an attack says in words is too long for a column here; the page has it there.
    words = [f"{outcome.attack.id}: {outcome.reason}" for outcome in done if outcome.score is None and outcome.reason]
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


def _rows(outcome: Outcome) -> list[list[str]]:
    """An attack, and each set of texts if there are several; titles and intervals are on the page."""
    verdict = "" if outcome.verdict is None else outcome.verdict.value
    head = f"{outcome.attack.id} {outcome.channel}"
    if outcome.score is None:
        own = outcome.own or {}
        labelled = {head: own, **own.get("sets", {})}
        return [[label, *_own_figures(one), "", verdict if label == head else ""] for label, one in labelled.items()]
    return [
        [label, *_figures(score), verdict if label == head else ""]
        for label, score in {head: outcome.score, **outcome.sets}.items()
    ]


def _own_figures(own: Mapping[str, Any]) -> list[str]:
    return [f"{100 * own[key]:.1f}" if own.get(key) is not None else "" for key in _FIGURES]


def _figures(score: Score) -> list[str]:
    rates = [f"{100 * getattr(score, key).value:.1f}" for key in _FIGURES]
    lines = [""]
    for kind, share in score.identifiers.items():
        part = f"{kind} {100 * share:.0f}"
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines[-1:] = [joined] if len(joined) < _COLUMNS["identifiers"] else [f"{lines[-1]},", part]
    return [*rates, "\n".join(lines)]


def _left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """Attacks that had no reason to run, by reason; the report's sentences name all others that did not run."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status in ("not needed", "not applicable"):
            about = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
            reasons.setdefault(about, []).append(outcome.name)
    return [f"{', '.join(ids)} {about}." for about, ids in reasons.items()]
