"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsea.client.options import ClientOptions


log = logging.getLogger(__name__)


def _check_server(address: str | None) -> str | None:
    """A typer callback: an address of another form is told before anything else is looked at."""
    from fedsea.wire.address import split_address

    if address:
        split_address(address)
    return address


Identity = Annotated[Path, typer.Option(help="Folder of this client's identity, made by `fedsea enroll`.")]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        callback=_check_server,
        help="The federation's server; relay://HOST:PORT where TLS ends at a relay.",
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="PATH", help="This machine's copy of the base model, if not where the plan says.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILES...", help="Files of the silo: jsonl, csv, parquet or txt. They stay on this machine."),
]
MoreData = Annotated[list[Path] | None, typer.Argument(hidden=True, metavar="FILES")]
Settings = Annotated[
    Path | None, typer.Option(metavar="TOML", help="This client's own limits, see `fedsea init`; never sent.")
]
Format = Annotated[
    str, typer.Option("--format", metavar="NAME", help="auto, text, prompt_completion, instruction or chat.")
]
Field = Annotated[
    list[str] | None,
    typer.Option(metavar="ROLE=COLUMN", help="Column of a role, such as `response=answer`; may be repeated."),
]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Count malformed rows instead of refusing them.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
RetryFor = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long a lost server is sought.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON line on stdout, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, and only warnings in the log.")]


def read_fields(pairs: list[str] | None) -> dict[str, str]:
    """`["response=answer"]` as a mapping.

    Raises:
        ConfigError: A pair has another form, or a role comes twice.
    """
    from fedsea.errors import ConfigError

    fields: dict[str, str] = {}
    for pair in pairs or ():
        role, equals, column = pair.partition("=")
        if not equals or not role or not column:
            raise ConfigError(f"--field {pair} is not ROLE=COLUMN; write for example --field response=answer.")
        if role in fields:
            raise ConfigError(f"--field gives the role {role} twice; give every role one column.")
        fields[role] = column
    return fields


def need_server(server: str | None) -> str:
    """The server's address.

    Raises:
        ConfigError: It was not given.
    """
    from fedsea.errors import ConfigError

    if not server:
        raise ConfigError("Give the server's address with --server HOST:PORT; ask the operator for it.")
    return server


def need_identity(folder: Path, role: str = "client") -> None:
    """Whether there is an identity that a client, or a server, can use.

    Raises:
        FedseaError: There is none, or it is another's; the message says what is missing.
    """
    from fedsea.wire.identity import Identity, Role

    Identity.load(folder).check_role(Role(role))


def need_run(folder: Path, otherwise: str = " With --base, the base model's own segments are used.") -> None:
    """Whether there is a run folder at all; what is in it shows when the server is known.

    Raises:
        ConfigError: There is none.
    """
    from fedsea.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}: give the run folder of `fedsea train` with --run.{otherwise}")


def look_for_server(address: str) -> None:
    """Say at once, and not when torch is loaded, if nothing answers there; a server may still come, and is sought."""
    from fedsea.wire.identity import unreachable

    if (error := unreachable(address)) is not None:
        log.warning("%s It is tried again when the libraries are loaded.", error.message)


def need_file(path: Path, option: str = "--data") -> None:
    """Whether there is a file.

    Raises:
        DataError: There is none, or it is a folder.
    """
    from fedsea.errors import DataError

    if path.is_dir():
        raise DataError(f"{path} is a folder: name the files in it, for example {option} {path}/*.jsonl.")
    if not path.exists():
        raise DataError(f"There is no file {path}: check the path after {option}.")


def need_device(device: str) -> str:
    """A device that this machine has.

    Raises:
        ConfigError: There is no such device.
    """
    from fedsea.errors import ConfigError

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"--device {device} is unknown: use cpu, cuda or cuda:N.")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"This machine has no device {device}: see `fedsea doctor`, or use --device cpu.")
    return device


def client_options(
    server: str,
    identity: Path,
    *,
    data: Sequence[Path] | None = (),
    more_data: list[Path] | None = None,
    run: Path,
    model: str | None = None,
    settings: Path | None = None,
    format_name: str = "auto",
    field: list[str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    evaluate: bool = True,
    retry_for: float = 60.0,
    skip_bad_rows: bool = False,
) -> ClientOptions:
    """The options of a command, as the Python call takes them; what can be checked before a connection is checked.

    It is checked before torch is loaded, which takes seconds; a server that does not answer is a warning. A command
    that needs no data leaves `data` out; None says that the user gave none. Without a server no identity is needed.

    Raises:
        ConfigError: An argument cannot work.
        DataError: A file is not there.
        AuthError: The identity cannot be used.
    """
    from fedsea.errors import ConfigError

    fields, files = read_fields(field), (*(data or ()), *(more_data or ()))
    need_device(device)
    if data is None and not files:
        raise ConfigError("No data files were given: name the silo's files with --data.")
    for path in files:
        need_file(path)
    if settings is not None:
        from fedsea.plan import load_limits

        load_limits(settings)
    if files or fields or format_name != "auto":
        from fedsea.data.formats import DataFormat
        from fedsea.data.opening import check_names

        if files:
            check_names(files)
        DataFormat(format_name, fields)  # type: ignore[arg-type]
    if server:
        need_identity(identity)
        look_for_server(server)
    from fedsea.client.options import ClientOptions

    return ClientOptions(
        server=server,
        identity=identity,
        data=files,
        run=run,
        model=model,
        settings=settings,
        format=format_name,
        fields=fields,
        threads=threads,
        device=device,
        evaluate=evaluate,
        retry_for_s=retry_for,
        skip_bad_rows=skip_bad_rows,
    )
