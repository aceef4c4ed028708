"""The command's frame: speed, help, errors, exit codes, signals, public names."""

import ast
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import fedsea
from fedsea.cli import main, output
from fedsea.errors import ConfigError, DataError

HEAVY = {"torch", "transformers", "peft", "grpc", "numpy", "cryptography", "pyarrow", "prometheus_client"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Makes `fedsea probe` do something."""

    def install(action: Callable[[], Any]) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.callback()(main._global)

        @app.command()
        def probe(as_json: bool = typer.Option(False, "--json")) -> None:
            output.begin(as_json=as_json, kept="Kept in runs/x.")
            action()

        monkeypatch.setattr(main, "app", app)

    return install


def all_commands() -> list[list[str]]:
    root: Any = typer.main.get_command(main.app)
    found = []
    for name, item in root.commands.items():
        inner = getattr(item, "commands", None)
        found += [[name, child] for child in inner] if inner else [[name]]
    return found


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# --- speed ----------------------------------------------------------------------------------------------------------


def imported_by(code: str) -> set[str]:
    shown = f"{code}\nimport sys; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_help_of_any_command_imports_nothing_heavy() -> None:
    lines = [f"main.run({[*names, '--help']!r})" for names in [[], *all_commands()]]
    imported = imported_by("from fedsea.cli import main\n" + "\n".join(lines))
    assert not HEAVY & imported


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_asking_a_server_does_not_load_torch(command: str, identities: Path, tmp_path: Path) -> None:
    words = [command, "--server", "127.0.0.1:1", "--identity", str(identities / "a")]
    words += ["--run", str(tmp_path)] if command == "doctor" else []
    no_gpu = "from fedsea.cli import checks, main; checks._may_be_gpu = lambda _: False"
    imported = imported_by(f"{no_gpu}\nassert main.run({words!r}) != main.INTERNAL")
    assert "grpc" in imported
    assert not {"torch", "transformers"} & imported


@pytest.mark.parametrize(("before", "after"), [(None, "NONE"), ("DEBUG", "DEBUG")])
def test_grpc_is_silent_unless_the_user_wants_to_hear_it(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if before is not None:
        monkeypatch.setenv("GRPC_VERBOSITY", before)
    assert main.run(["version"]) == 0
    assert os.environ["GRPC_VERBOSITY"] == after


def test_import_fedsea_imports_nothing_heavy() -> None:
    assert not (HEAVY | {"typer", "rich", "pydantic"}) & imported_by("import fedsea; dir(fedsea)")


def test_every_public_name_is_there_and_is_listed() -> None:
    for name in fedsea.__all__:
        assert getattr(fedsea, name) is not None
        assert name in dir(fedsea)
    assert set(fedsea._HOMES) | {"__version__"} == set(fedsea.__all__)


def test_type_checkers_see_the_same_names_from_the_same_places() -> None:
    stub = ast.parse(Path(fedsea.__file__).with_suffix(".pyi").read_text())
    seen = {
        alias.asname or alias.name: node.module if alias.asname is None else f"{node.module}:{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == fedsea._HOMES
    listed = next(node.value for node in stub.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed) == fedsea.__all__


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        fedsea.no_such_name  # noqa: B018


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", all_commands(), ids=" ".join)
def test_every_help_shows_an_example(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*names, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f": fedsea {' '.join(names)}" in shown


def test_the_reference_page_is_up_to_date() -> None:
    script = Path(__file__).parents[3] / "scripts" / "make_cli_reference.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0
    assert capsys.readouterr().out == f"fedsea {fedsea.__version__}\n"


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_error_is_one_sentence_on_stderr_and_its_exit_code(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(fail(DataError("a.jsonl, line 3: not JSON.")))
    assert main.run(["probe"]) == 3
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Error: a.jsonl, line 3: not JSON.\n")


def test_with_json_an_error_is_one_json_line_on_stdout(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(fail(ConfigError("No.")))
    assert main.run(["probe", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": {"code": "CONFIG", "message": "No."}}
    assert shown.err == ""


def test_an_unforeseen_error_names_type_and_place_and_never_its_message(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(fail(ValueError("patient 17 has measles")))
    assert main.run(["probe"]) == main.INTERNAL
    shown = capsys.readouterr().err
    assert "ValueError at test_main.py" in shown
    assert "patient" not in shown
    assert len(shown.splitlines()) == 1


def test_debug_shows_the_trace(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(fail(ValueError("odd")))
    assert main.run(["--debug", "probe"]) == main.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_says_what_to_lower(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(fail(MemoryError()))
    assert main.run(["probe"]) == main.INTERNAL
    assert "micro_batch_sequences" in capsys.readouterr().err


def test_ctrl_c_says_what_was_kept(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(fail(KeyboardInterrupt()))
    assert main.run(["probe"]) == 130
    assert capsys.readouterr().err == "Interrupted. Kept in runs/x.\n"


def test_sigterm_leaves_through_the_context_managers_and_says_what_was_kept(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    left = []

    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            left.append(True)

    command(action)
    assert main.run(["probe", "--json"]) == 143
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "TERMINATED"
    assert left == [True]


def test_a_closed_pipe_is_no_trace(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(fail(BrokenPipeError()))
    assert main.run(["probe"]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["version"], ["--help"], ["probe", "--json"]])
def test_a_result_that_cannot_be_written_is_one_sentence_and_exit_code_4(
    arguments: list[str],
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "probe" in arguments:
        command(lambda: output.result({"ok": True}))
    with Path("/dev/full").open("w") as stream:  # whose end fails if something is left for it
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.run(arguments) == 4
    said = capsys.readouterr().err
    assert said == "Error: Cannot write standard output: the disk is full; free some space, then start again.\n"


def test_an_error_that_cannot_be_written_to_stdout_is_on_stderr(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(fail(DataError("No rows.")))
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.run(["probe", "--json"]) == 3
    assert capsys.readouterr().err == "Error: No rows.\n"


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_work_does_not_fail_because_stderr_cannot_be_written(
    extra: list[str], command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def action() -> None:
        output.tell("begun")
        logging.getLogger("fedsea").warning("going on")
        raise DataError("No rows.")

    command(action)
    for path in ("/dev/full", None):
        with contextlib.ExitStack() as stack:
            stream = None if path is None else stack.enter_context(Path(path).open("w"))
            monkeypatch.setattr(sys, "stderr", stream)
            assert main.run(["probe", *extra]) == 3


def test_nothing_is_begun_where_stdout_is_closed(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(fail(AssertionError()))
    monkeypatch.setattr(sys, "stdout", None)
    assert main.run(["probe", "--json"]) == 2
    assert capsys.readouterr().err == "Error: Standard output is closed: send it to a file, or to /dev/null.\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["train", "--nonsense"], ["--log-level", "loud", "version"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    assert "Error: " in capsys.readouterr().err


def test_with_json_a_wrong_command_line_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "USAGE"


def test_quiet_lowers_the_log_unless_a_level_was_asked_for() -> None:
    for arguments, level in ((["--log-level", "debug"], logging.DEBUG), ([], logging.WARNING)):
        assert main.run([*arguments, "train", "--quiet"]) == 2  # no server was given
        assert logging.getLogger("fedsea").level == level
