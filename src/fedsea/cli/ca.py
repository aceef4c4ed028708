"""`fedsea ca`: the operator's certificate authority."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import output

if TYPE_CHECKING:
    from datetime import datetime

    from fedsea.wire.identity.journal import Entry
    from fedsea.wire.identity.requests import SigningRequest

app = typer.Typer(
    no_args_is_help=True,
    help="The federation's certificate authority: who may take part (for the operator).",
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Option("--folder", help="The authority's folder.")]
Days = Annotated[float, typer.Option("--days", help="How long the certificate is valid.", min=0.001, max=825)]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Host name or address under which clients reach the server; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for scripts.")]
_FOLDER = Path("ca")
_TABLE_COLUMNS = 80
"""What a table of certificates takes with whole serial numbers."""


@app.command("init")
def init(
    folder: Folder = _FOLDER,
    name: Annotated[str, typer.Option(help="Name of the authority, such as the federation's.")] = "fedsea federation",
    host: Hosts = None,
    days: Days = 30,
    as_json: Json = False,
) -> None:
    """Make the authority and the server's first identity.

    Without `--host` the certificate is for localhost and this machine's host name.

    Example: `fedsea ca init --host fedsea.example.org`
    """
    import socket

    from fedsea.wire.identity import Authority

    hosts = host or ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    authority = Authority.create(folder, name)
    server = authority.issue_server(hosts, days=days)
    if as_json:
        output.result({"ca_fingerprint": authority.fingerprint, "server": str(server), "hosts": hosts})
        return
    output.say(f"Made the authority {folder} and the server's identity {server} for {', '.join(hosts)}.")
    output.say(f"Keep {folder} secret: whoever has its key can let anyone in.")
    output.say("Tell every client this fingerprint by telephone or in person, not along with the certificate:")
    output.say(f"  {authority.fingerprint}")


@app.command("approve")
def approve(
    request: Annotated[Path, typer.Argument(metavar="CSR_FILE", help="The request that the client sent.")],
    folder: Folder = _FOLDER,
    name: Annotated[str | None, typer.Option(help="Another name than the request asks for.")] = None,
    days: Days = 30,
    out: Annotated[Path | None, typer.Option(help="Where the certificate is written; beside the request.")] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="What the client shows; if it is the same, approves without asking."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; only where the request cannot be another's.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Admit a name that was revoked.")] = False,
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="client, or relay: where TLS ends on the way; it passes sealed data on.")
    ] = "client",
    as_json: Json = False,
) -> None:
    """Approve a client's request, after comparing its fingerprint with the client's; or a relay's.

    Example: `fedsea ca approve clinic.request.pem`
    """
    from fedsea.errors import AuthError, ConfigError
    from fedsea.wire.identity import Authority, Role
    from fedsea.wire.identity.certificates import same_fingerprint
    from fedsea.wire.identity.files import read_file, write_public

    if role not in ("client", "relay"):
        raise ConfigError(f"--role {role} is unknown: use client or relay.")
    authority = Authority.open(folder)
    csr_pem = read_file(request, "give the path of the request that the client sent.")
    asked, valid = authority.inspect(csr_pem, name=name, again=again)
    _show_request(asked, name or asked.name, valid)
    if fingerprint is not None:
        if not same_fingerprint(asked.fingerprint, fingerprint):
            raise AuthError("The request's fingerprint is another one, so it is not the client's: approve nothing.")
    elif not yes:
        _ask()
    certificate = authority.approve(csr_pem, name=name, days=days, again=again, role=Role(role))
    out = out or request.with_name(f"{certificate.name}.certificate.pem")
    write_public(out, certificate.pem)
    if as_json:
        until = certificate.not_after.isoformat()
        output.result({"name": certificate.name, "serial": certificate.serial, "not_after": until, "file": str(out)})
        return
    what = " as a relay" if role == "relay" else ""
    output.say(f"{certificate.name} is approved{what} until {certificate.not_after:%Y-%m-%d}.")
    output.say(f"Send {out} to {certificate.name}, which then runs:")
    typer.echo(f"  fedsea enroll --install {out.name} --ca-fingerprint …")
    output.say(f"where … is the authority's fingerprint, told by another way: {authority.fingerprint}")


def _ask() -> None:
    from fedsea.errors import ConfigError, FedseaError

    try:
        same = typer.confirm("Does the client show the same fingerprint?", err=True)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise ConfigError(
            "Nobody answered, so nothing was written: in a script, give what the client shows with --fingerprint."
        ) from None
    if not same:
        raise FedseaError("Not approved; nothing was written.")


def _show_request(asked: SigningRequest, name: str, valid: list[Entry]) -> None:
    output.tell(f"Name         {name}" + (f" (asks for {asked.name})" if name != asked.name else ""))
    output.tell(f"Fingerprint  {asked.fingerprint}")
    if again := [entry for entry in valid if entry.key == asked.fingerprint]:
        until = max(entry.not_after for entry in again)
        output.tell(
            f"This request was approved before, until {until:%Y-%m-%d}: approving it again issues one more certificate "
            "for the same key, which is only needed if the first one was lost.",
        )
    if others := [entry for entry in valid if entry.key != asked.fingerprint]:
        until = max(entry.not_after for entry in others)
        output.tell(
            f"Attention: {name} already has {len(others)} valid certificate(s) under another key, until "
            f"{until:%Y-%m-%d}. If that key is lost or stolen, revoke the name first and approve this with --again.",
        )


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A client's name, or one certificate's serial number.")],
    folder: Folder = _FOLDER,
    reason: Annotated[str, typer.Option(help="Kept in the authority's journal.")] = "",
    as_json: Json = False,
) -> None:
    """Revoke a client; a running server closes its connections within seconds.

    Example: `fedsea ca revoke clinic --reason "left the federation"`
    """
    from fedsea.wire.identity import Authority

    revoked = Authority.open(folder).revoke(name, reason)
    if as_json:
        output.result({"name": name, "revoked": [entry.serial for entry in revoked]})
        return
    if not revoked:
        output.say(f"{name} was revoked before.")
        return
    output.say(f"Revoked {len(revoked)} {'certificate' if len(revoked) == 1 else 'certificates'} of {name}.")
    output.say(
        'A run that needs it, as one with training.wait = "all" does, stands still until it is admitted again; without '
        "it, go on with a new plan in a new run."
    )


@app.command("list")
def list_(
    folder: Folder = _FOLDER,
    as_json: Json = False,
) -> None:
    """List the certificates that were issued, and how they stand.

    Example: `fedsea ca list --json`
    """
    from fedsea.wire.identity import Authority
    from fedsea.wire.identity.certificates import utc_now

    authority, now = Authority.open(folder), utc_now()
    entries = authority.entries()
    if as_json:
        rows = [
            {
                "name": entry.name,
                "role": entry.role.value,
                "serial": entry.serial,
                "not_before": entry.not_before.isoformat(),
                "not_after": entry.not_after.isoformat(),
                "status": entry.status(now),
                "fingerprint": entry.key,
            }
            for entry in entries
        ]
        output.result({"ca_fingerprint": authority.fingerprint, "certificates": rows})
        return
    _show_entries(entries, now)
    output.say(f"Authority {authority.fingerprint}")


def _show_entries(entries: list[Entry], now: datetime) -> None:
    """Two lines or more for each, so that names and serial numbers stay whole, to be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if console.width < _TABLE_COLUMNS:  # no room for columns: the terminal breaks the lines, and cuts nothing
        for entry in entries:
            stands = f"{entry.role.value}, {entry.status(now)}, until {entry.not_after:%Y-%m-%d %H:%M} UTC"
            typer.echo("\n".join((*entry.name.split(","), entry.serial, stands)))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name, serial", overflow="fold")
    for heading in ("role", "status", "until (UTC)"):
        table.add_column(heading, no_wrap=True)
    for entry in entries:
        until = f"{entry.not_after:%Y-%m-%d %H:%M}"
        names = Text(entry.name.replace(",", "\n")).append(f"\n{entry.serial}", style="dim")
        table.add_row(names, entry.role.value, entry.status(now), until)
    console.print(table)


@app.command("server")
def server(
    folder: Folder = _FOLDER,
    host: Hosts = None,
    days: Days = 30,
    out: Annotated[Path | None, typer.Option(help="Identity folder; FOLDER/server if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Issue or renew a server's identity; without `--host`, for the same host names as before.

    Example: `fedsea ca server --host fedsea.example.org --host 192.0.2.10`
    """
    from fedsea.wire.identity import Authority, Identity
    from fedsea.wire.identity import certificates as certs

    written = Authority.open(folder).issue_server(host or [], days=days, folder=out)
    identity = Identity.load(written)
    if as_json:
        hosts = certs.host_names(certs.certificate_from_pem(identity.certificate_pem, "The server's certificate"))
        until = identity.not_after.isoformat()
        output.result({"server": str(written), "hosts": list(hosts), "not_after": until})
        return
    output.say(f"The server's identity {written} for {identity.name} is valid until {identity.not_after:%Y-%m-%d}.")
