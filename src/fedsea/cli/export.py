"""`fedsea export`: the trained model as a PEFT adapter or a merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import options as o
from fedsea.cli import output


def export(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")] = Path("adapter"),
    server: o.Server = None,
    run: Annotated[Path, typer.Option(help="At a client: run folder of `fedsea train`.")] = Path("runs/client"),
    identity: o.Identity = Path("identity"),
    server_run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="At the operator: run folder of `fedsea server`.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model, adapter merged in.")] = False,
    model: o.Model = None,
    retry_for: o.RetryFor = 60.0,
    as_json: o.Json = False,
) -> None:
    """Write the whole model's adapter in PEFT's format: this client's part and the trunk's.

    At a client it needs the run folder, and the server for the trunk's part. At the operator it needs only the
    server's run folder, and takes the model as it was after the last complete round.

    At a client: `fedsea export --server fedsea.example.org:7443 --run runs/clinic --out adapter`

    At the operator: `fedsea export --server-run runs/server --out adapter`
    """
    from fedsea.errors import ConfigError
    from fedsea.storage import check_new_folder

    output.begin(as_json=as_json)
    check_new_folder(out, "--out")
    if server_run is not None:
        if server is not None or model is not None:
            raise ConfigError("--server-run stands alone: the base model is the one that the plan in it names.")
        if not server_run.is_dir():
            raise ConfigError(f"There is no folder {server_run}: give the run folder of `fedsea server`.")
        from fedsea.server.run import export_run

        export_run(server_run, out, merged)
    else:
        address = o.need_server(server)
        o.need_run(run, "")
        options = o.client_options(address, identity, run=run, model=model, retry_for=retry_for)
        from fedsea.cli.loading import LIBRARIES, Loading

        with Loading(as_json) as loading:
            loading(LIBRARIES)
            from fedsea.client.results import export_adapter

            export_adapter(options, out, merged, loading)
    if as_json:
        output.result({"out": str(out), "merged": merged})
    elif merged:
        output.say(f"Wrote the merged model to {out}; load it with AutoModelForCausalLM.from_pretrained.")
    else:
        output.say(
            f"Wrote the adapter to {out}; load it with PeftModel.from_pretrained(base, {str(out)!r}), "
            "over the base model in the plan's model.dtype."
        )
