"""`fedsea train`: a client takes part in a federation, or trains alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import options as o
from fedsea.cli import output

if TYPE_CHECKING:
    from fedsea.client.options import ClientOptions
    from fedsea.client.run import TrainSummary
    from fedsea.observe.observers import EvaluationLike, StepLike


_NEXT = (
    "While the server runs, `fedsea generate`, `chat` and `gateway` use the model, `fedsea eval` measures it and "
    "`fedsea export` takes it away, all with the same --server, --identity, --model and --run."
)


def train(
    server: o.Server = None,
    data: o.Data = None,
    more_data: o.MoreData = None,
    identity: o.Identity = Path("identity"),
    model: o.Model = None,
    run: Annotated[Path, typer.Option(help="Run folder; the same command goes on from what is in it.")] = Path(
        "runs/client"
    ),
    settings: o.Settings = None,
    format_name: o.Format = "auto",
    field: o.Field = None,
    skip_bad_rows: o.SkipBadRows = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not evaluate the held-out split.")] = False,
    retry_for: o.RetryFor = 600.0,
    alone: Annotated[bool, typer.Option("--alone", help="Without a server: the trunk runs in this process.")] = False,
    plan: Annotated[Path | None, typer.Option(metavar="TOML", help="With --alone: the plan.")] = None,
    name: Annotated[str | None, typer.Option(help="With --alone: which client of the plan this is.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train on this machine's files with a federation, until its run is over.

    Needs an identity (`fedsea enroll`), the base model, and files. Stopped or killed, the same command goes on.

    Example: `fedsea train --server fedsea.example.org:7443 --data notes/*.jsonl --run runs/clinic`

    Without a server: `fedsea train --alone --plan plan.toml --name clinic --data notes/*.jsonl`
    """
    silent = output.begin(as_json=as_json, quiet=quiet)
    kept = _Kept(run)
    _check_alone(plan, name, alone=alone)
    settings_given = o.client_options(
        "" if alone else o.need_server(server),
        identity,
        data=data,
        more_data=more_data,
        run=run,
        model=model,
        settings=settings,
        format_name=format_name,
        field=field,
        threads=threads,
        device=device,
        evaluate=not no_eval,
        retry_for=retry_for,
        skip_bad_rows=skip_bad_rows,
    )
    _check_rows(settings_given)
    summary = _run(settings_given, plan, name, kept, silent=silent)
    if as_json:
        output.result(asdict(summary))
    elif not quiet:
        output.say(_sentence(summary, run))
        if summary.claim:
            output.say(f"{summary.claim[0].upper()}{summary.claim[1:]}.")
        if not alone:
            output.say(_NEXT)


def _check_alone(plan: Path | None, name: str | None, *, alone: bool) -> None:
    from fedsea.errors import ConfigError

    if not alone and (plan is not None or name is not None):
        raise ConfigError("--plan and --name go with --alone; with a server they come from it and the identity.")
    if alone:
        if plan is None or name is None:
            raise ConfigError("--alone needs --plan with the plan's file and --name with the client's name in it.")
        from fedsea.plan import load_plan

        load_plan(plan).alone(name)


def _check_rows(options: ClientOptions) -> None:
    """Say what is wrong with the first row before the libraries are loaded, which takes seconds."""
    from fedsea.data.opening import check_beginning

    if options.data:
        check_beginning(options.data, options.data_format, skip_bad=options.skip_bad_rows)


class _Kept:
    """Whoever stops the command is told where what was applied is kept, as soon as anything was."""

    def __init__(self, run: Path) -> None:
        self._sentence = f"What was applied is kept in {run}: the same command goes on from there."
        if any(file.stem > "step-00000000" for file in (run / "checkpoints").glob("step-*.safetensors")):
            output.current.kept = self._sentence

    def step(self, _report: StepLike) -> None:
        output.current.kept = self._sentence

    def evaluation(self, _report: EvaluationLike) -> None:
        """Applies nothing."""


def _run(options: ClientOptions, plan: Path | None, name: str | None, kept: _Kept, *, silent: bool) -> TrainSummary:
    from fedsea.cli.loading import LIBRARIES
    from fedsea.observe.observers import compose
    from fedsea.observe.progress import ClientDisplay
    from fedsea.observe.recorders import ClientRecorder

    with ClientDisplay(quiet=silent) as display, ClientRecorder(options.run) as recorder:
        display.loading(LIBRARIES)
        from fedsea.client import run as client

        observer = compose(display, recorder, kept)
        if plan is not None and name is not None:
            return client.train_alone(plan, name, options, observer)
        return client.train(options, observer)


def _sentence(summary: TrainSummary, run: Path) -> str:
    from fedsea.observe.figures import bytes_text

    if summary.finished_before:
        parts = [f"This run is finished ({summary.next_step} steps), and nothing was left to do"]
    else:
        parts = [f"Finished after {summary.next_step} steps"]
    if summary.loss_before is not None and summary.loss_after is not None:
        since = f" since step {summary.step_before}" if summary.step_before else ""
        parts.append(f"held-out loss {summary.loss_before:.4f} → {summary.loss_after:.4f}{since}")
    if summary.bytes_sent and not summary.finished_before:
        parts.append(f"sent {bytes_text(summary.bytes_sent)}, received {bytes_text(summary.bytes_received)}")
    return f"{'; '.join(parts)}. Everything is in {run}."
