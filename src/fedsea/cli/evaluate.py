"""`fedsea eval`: loss and perplexity on a silo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import options as o
from fedsea.cli import output

_WHOSE = {"trained": "segments trained here", "base": "base model's own segments (--base)"}
_ROWS = {
    "held_out": "the held-out rows",
    "unchecked": "the rows that a training on these files would hold out",
    "all": "all rows",
    "all_of_other_files": "all rows of files that are not those of the training",
}


def evaluate(
    server: o.Server = None,
    data: o.Data = None,
    more_data: o.MoreData = None,
    identity: o.Identity = Path("identity"),
    model: o.Model = None,
    run: Annotated[Path, typer.Option(help="Run folder of `fedsea train` with this server.")] = Path("runs/client"),
    base: Annotated[
        bool, typer.Option("--base", help="The base model's own segments with the server's trunk; needs no run folder.")
    ] = False,
    settings: o.Settings = None,
    format_name: o.Format = "auto",
    field: o.Field = None,
    skip_bad_rows: o.SkipBadRows = False,
    everything: Annotated[bool, typer.Option("--all", help="All rows of any files, held out or not.")] = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    retry_for: o.RetryFor = 60.0,
    as_json: o.Json = False,
) -> None:
    """Loss and perplexity of the federation's model on this machine's files.

    Needs what `fedsea train` needs; the trunk's part runs at the server, in the state that it has now. The held-out
    split is that of the files of the training, in their order; others are refused without `--all`.

    Example: `fedsea eval --server fedsea.example.org:7443 --data notes/*.jsonl --run runs/clinic`
    """
    output.begin(as_json=as_json)
    address = o.need_server(server)
    if not base:
        o.need_run(run)
    options = o.client_options(
        address,
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
        retry_for=retry_for,
        skip_bad_rows=skip_bad_rows,
    )
    from fedsea.cli.loading import LIBRARIES, Loading

    with Loading(as_json) as loading:
        loading(LIBRARIES)
        from fedsea.client import results

        summary = results.evaluate(options, everything, base, loading)
    if as_json:
        output.result(asdict(summary))
    else:
        output.say(
            f"loss {summary.mean_loss:.4f} nats per token, perplexity {summary.perplexity:.2f}, "
            f"over {summary.num_target_tokens:,} tokens of {_ROWS[summary.rows]}, "
            f"with the {_WHOSE[summary.segments]}"
        )
