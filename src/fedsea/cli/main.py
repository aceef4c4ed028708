"""The `fedsea` command. Everything heavy is imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from fedsea import __version__
from fedsea.cli import (
    audit,
    ca,
    chat,
    doctor,
    enroll,
    evaluate,
    export,
    gateway,
    generate,
    init,
    ledger,
    output,
    pseudonyms,
    quickstart,
    server,
    status,
    train,
)
from fedsea.errors import ConfigError, FedseaError

INTERRUPTED, TERMINATED, INTERNAL = 130, 143, 70
"""Exit codes besides those of the errors: Ctrl-C, SIGTERM, and an error that nobody foresaw."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Who sets one of these decides how torch's threads wait. By themselves they spin: where others use the cores, threads
that work wait for threads that wait, and a step takes several times as long."""

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # typer carries click with it, or imports it

app = typer.Typer(
    name="fedsea",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart", rich_help_panel="Begin")(quickstart.quickstart)
app.command("init", rich_help_panel="Begin")(init.init)
app.command("doctor", rich_help_panel="Begin")(doctor.doctor)
app.add_typer(ca.app, name="ca", rich_help_panel="Operator")
app.command("server", rich_help_panel="Operator")(server.server)
app.command("enroll", rich_help_panel="Client")(enroll.enroll)
app.command("train", rich_help_panel="Client")(train.train)
app.command("eval", rich_help_panel="Client")(evaluate.evaluate)
app.command("generate", rich_help_panel="Client")(generate.generate)
app.command("chat", rich_help_panel="Client")(chat.chat)
app.command("gateway", rich_help_panel="Client")(gateway.gateway)
app.command("audit", rich_help_panel="Both")(audit.audit)
app.add_typer(pseudonyms.app, name="pseudonyms", rich_help_panel="Client")
app.command("export", rich_help_panel="Both")(export.export)
app.command("ledger", rich_help_panel="Client")(ledger.ledger)
app.command("status", rich_help_panel="Both")(status.status)


class _Terminated(BaseException):
    """SIGTERM came."""


def _show_version(wanted: bool) -> None:
    if wanted:
        output.say(f"fedsea {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error; info if not given.")
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as JSON lines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show traces of errors.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune one large language model together without sharing data.

    Try it on this machine: `fedsea quickstart`

    Every command's `--help` shows an example. Exit codes are in docs/reference/cli.md.
    """
    from fedsea.observe.logging import LEVELS, configure

    if log_level is not None and log_level not in LEVELS:
        raise typer.BadParameter(f"choose one of {', '.join(LEVELS)}", param_hint="--log-level")
    output.current.debug, output.current.log_level = debug, log_level
    configure("debug" if debug else log_level or "info", log_json)


@app.command("version", rich_help_panel="Both")
def version() -> None:
    """Show the version.

    Example: `fedsea version`
    """
    _show_version(True)


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code.
    """
    with output.checked():
        if sys.stdout is None:  # so says Python; the next file that is opened would get its number
            output.tell("Error: Standard output is closed: send it to a file, or to /dev/null.")
            return ConfigError.exit_code
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    output.current = output.Invocation(as_json="--json" in arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines on stderr say nothing that our errors do not
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch loads, which nothing has done yet
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        returned = typer.main.get_command(app).main(list(arguments), prog_name="fedsea", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
        return _stopped("Interrupted", INTERRUPTED) if code == INTERRUPTED else code
    except FedseaError as error:
        _trace()
        output.failure(error.code, error.message)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped("Interrupted", INTERRUPTED)
    except _Terminated:
        return _stopped("Terminated", TERMINATED)
    except BrokenPipeError:
        return 1
    except _ClickException as error:
        return _usage(error)
    except Exception as error:  # noqa: BLE001 (the last resort: a sentence instead of a trace)
        _trace()
        output.failure("INTERNAL", _unexpected(error))
        return INTERNAL


def main() -> NoReturn:
    """Entry point of the `fedsea` command."""
    sys.exit(run(sys.argv[1:]))


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _stopped(how: str, code: int) -> int:
    sentence = f"{how}. {output.current.kept}".rstrip()
    if output.current.as_json:
        output.failure(how.upper(), sentence)
    else:
        output.tell(sentence)
    return code


def _usage(error: Exception) -> int:
    if output.current.as_json:
        output.failure("USAGE", error.format_message())  # type: ignore[attr-defined]
    else:
        error.show()  # type: ignore[attr-defined]
    return int(getattr(error, "exit_code", 2))


def _trace() -> None:
    if output.current.debug:
        traceback.print_exc()


def _unexpected(error: Exception) -> str:
    """Name type and place only: the message of a foreign exception might quote somebody's text."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "There is not enough memory: lower training.micro_batch_sequences or data.max_tokens in the plan, or set "
            "model.activation_checkpointing = true; `fedsea doctor` says what the segment needs."
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return (
        f"Something went wrong that fedsea did not foresee ({type(error).__name__}{place}). "
        "Run it as `fedsea --debug …` to see the trace, and report it."
    )
