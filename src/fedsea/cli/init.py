"""`fedsea init`: an example federation to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import output

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"

_README = """\
# A federation

`plan.toml` is what everybody agrees on; the operator keeps it. `client.toml` is an example of one client's own
settings. Every command has `--help`.

## The operator, once

    fedsea ca init --host fedsea.example.org
    fedsea doctor --plan plan.toml

Tell every client the authority's fingerprint by telephone or in person.

## Every client, once

Each under its own name in the plan ({names}); this is for {first}:

    fedsea enroll --name {first}

Send `identity/{first}.request.pem` to the operator, who compares the fingerprint, runs
`fedsea ca approve {first}.request.pem` and sends `{first}.certificate.pem` back. With that answer:

    fedsea enroll --install {first}.certificate.pem --ca-fingerprint …
    fedsea doctor --server fedsea.example.org:7443

## The run

The operator:

    fedsea server --plan plan.toml --listen 0.0.0.0:7443

Every client ({names}):

    fedsea train --server fedsea.example.org:7443 --data notes/*.jsonl

A client that has limits of its own (which segments may be trained there, how many blocks), adds noise of its own,
or replaces names and identifiers by pseudonyms copies `client.toml` to its
machine, looks it over, and adds `--settings client.toml`.

Anybody with an identity: `fedsea status --server fedsea.example.org:7443`. A process that was stopped or killed is
started again with the same command and goes on.

## Afterwards

    fedsea eval --server fedsea.example.org:7443 --data notes/*.jsonl
    fedsea export --server fedsea.example.org:7443 --out adapter

The server stays when the run is finished, and the model is used through it, each client with its own segments:

    fedsea generate --server fedsea.example.org:7443 "The patient was"
    fedsea chat --server fedsea.example.org:7443
    fedsea gateway --server fedsea.example.org:7443

The text stays with the clients, prompts and answers too, but the server CAN reconstruct it from the hidden states
and gradients that it receives (`trust.mode = "trusted-server"`): choose the operator accordingly.
"""


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if absent.")] = Path("federation"),
    clients: Annotated[str, typer.Option(metavar="NAMES", help="Names of the clients, with commas between.")] = (
        "clinic,bank,law-office"
    ),
    model: Annotated[str, typer.Option(metavar="PATH", help="Base model: a folder, or an id of the hub.")] = (
        DEFAULT_MODEL
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line on stdout, for scripts.")] = False,
) -> None:
    """Write an example federation: a plan with every key explained, a client's settings, and what to do next.

    Needs nothing; overwrites nothing.

    Example: `fedsea init my-federation --clients clinic,bank --model models/llama`
    """
    output.begin(as_json=as_json)
    files = texts(_model(model), [name.strip() for name in clients.split(",") if name.strip()])
    written = write(folder, files)
    if as_json:
        output.result({"files": [str(path) for path in written]})
    else:
        output.say(f"Wrote {', '.join(str(path) for path in written)}.")
        output.say(f"Read {folder / 'README.md'} for what to do next; look over {folder / 'plan.toml'} first.")


def texts(model: str, clients: list[str]) -> dict[str, str]:
    """File name to text of an example federation.

    Raises:
        ConfigError: A name cannot be a client's.
    """
    import tomllib

    from fedsea.cli.plan_text import plan_text, settings_text
    from fedsea.errors import ConfigError
    from fedsea.plan import parse_plan

    if not clients:
        raise ConfigError("Name at least one client, for example --clients clinic,bank.")
    plan = plan_text(model, clients)
    parse_plan(tomllib.loads(plan), "--clients")
    names = ", ".join(clients)
    return {
        "plan.toml": plan,
        "client.toml": settings_text(),
        "README.md": _README.format(first=clients[0], names=names),
    }


def write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write all files, or none if one of them exists.

    Raises:
        ConfigError: A file is there already.
        StorageError: The disk refused.
    """
    from fedsea.errors import ConfigError
    from fedsea.storage import storage_error, write_bytes_atomic

    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder} has {', '.join(there)} already: choose another folder, or remove them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("make", folder, error) from None
    for name, text in files.items():
        write_bytes_atomic(folder / name, text.encode())
    return [folder / name for name in files]


def _model(model: str) -> str:
    """A folder given from here is written so that it is also found from the plan's place."""
    if Path(model).is_absolute() and not Path(model).is_dir():
        output.tell(f"Attention: there is no folder {model} on this machine; the server needs it there.")
    return str(Path(model).resolve()) if Path(model).is_dir() else model
