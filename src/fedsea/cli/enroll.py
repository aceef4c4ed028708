"""`fedsea enroll`: a client's key and certificate. Mount it as `app.command("enroll")(enroll)`, or `app` as a group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import output

app = typer.Typer(help="Get this client's certificate (for every organisation that takes part).")

_FOLDER = Path("identity")


@app.callback(invoke_without_command=True)
def enroll(
    name: Annotated[str | None, typer.Option(help="What this client is to be called, as in the plan.")] = None,
    folder: Annotated[Path, typer.Option(help="Where key and certificate are kept.")] = _FOLDER,
    again: Annotated[bool, typer.Option("--again", help="Ask for a new key beside the old one.")] = False,
    install: Annotated[Path | None, typer.Option(metavar="CERT", help="Install the operator's answer.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The authority's certificate, if it is not in CERT.")] = None,
    ca_fingerprint: Annotated[str | None, typer.Option(help="What the operator told you by another way.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for scripts.")] = False,
) -> None:
    """Make a key and a signing request, or install the answer to it. The key never leaves this machine.

    First: `fedsea enroll --name clinic`

    Then: `fedsea enroll --install clinic.certificate.pem --ca-fingerprint AB:12:…`
    """
    from fedsea.errors import ConfigError

    if install is not None:
        if ca_fingerprint is None:
            raise ConfigError(
                "Give --ca-fingerprint: ask the operator for the authority's fingerprint by telephone or in person."
            )
        _install(folder, install, ca, ca_fingerprint, as_json)
    elif name is not None:
        _request(folder, name, again, as_json)
    else:
        raise ConfigError("Give --name to make a request, or --install with the operator's answer.")


def _request(folder: Path, name: str, again: bool, as_json: bool) -> None:
    from fedsea.wire import identity

    enrollment = identity.enroll(folder, name, again=again)
    if as_json:
        path = str(enrollment.request_path)
        output.result({"name": name, "fingerprint": enrollment.fingerprint, "request": path})
        return
    option = "" if folder == _FOLDER else f" --folder {folder}"
    output.say(f"The key stays in {folder}. Tell the operator its fingerprint by telephone or in person:")
    output.say(f"  {enrollment.fingerprint}")
    output.say("With the answer, run:")
    typer.echo(f"  fedsea enroll{option} --install {name}.certificate.pem --ca-fingerprint …")
    output.say(f"Now send {enrollment.request_path} to the operator.")


def _install(folder: Path, certificate: Path, ca: Path | None, ca_fingerprint: str, as_json: bool) -> None:
    from fedsea.wire import identity
    from fedsea.wire.identity.files import read_file

    advice = "give the path of the file that the operator sent."
    installed = identity.install(
        folder, read_file(certificate, advice), read_file(ca, advice) if ca else None, ca_fingerprint
    )
    if as_json:
        until = installed.not_after.isoformat()
        output.result({"name": installed.name, "serial": installed.serial, "not_after": until})
        return
    until = f"{installed.not_after:%Y-%m-%d}"
    if installed.role == "relay":
        output.say(f"This relay is {installed.name} until {until}; before that, ask for the next with --again.")
    else:
        output.say(f"This client is {installed.name} until {until}; it renews itself while it is used.")
