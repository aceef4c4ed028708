"""What is said and found out before torch is loaded, by commands that load it."""

from __future__ import annotations

import io
import logging
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import rich.console
from rich.console import Console

from fedsea.cli import main, options
from fedsea.cli.loading import Loading
from fedsea.wire.identity import unreachable
from tests.support.assets import toml

LINE = "Loading the libraries, which takes some seconds.\n"


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What loads torch cannot be loaded, and there is a plan and a file in the working folder."""
    for name in ("client.setup", "client.run", "client.inference", "client.results", "client.gateway.run"):
        monkeypatch.setitem(sys.modules, f"fedsea.{name}", None)
    for name in ("client.setup", "client.run", "client.results", "client.gateway.run"):
        monkeypatch.delattr(f"fedsea.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "fedsea.audit.report", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "plan.toml").write_text(toml({"model": {"path": "m"}, "clients": [{"name": "a"}]}))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of loopback at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def free() -> int:
    """A port of loopback at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.usefixtures("without_folders", "nothing_loads")
@pytest.mark.parametrize(
    "command",
    [
        ["train", "--alone", "--plan", "plan.toml", "--name", "a", "--data", "a.csv"],
        ["train", "--server", "h:1", "--data", "a.csv"],
        ["eval", "--server", "h:1", "--data", "a.csv"],
        ["export", "--server", "h:1"],
        ["generate", "the", "--server", "h:1"],
        ["chat", "--server", "h:1"],
        ["gateway", "--server", "h:1", "--port", "0"],
        ["audit", "plan.toml"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_command_says_that_it_loads_before_it_does(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(command) == main.INTERNAL
    assert capsys.readouterr().err.startswith(LINE)
    if command[0] != "chat":
        assert main.run([*command, "--json"]) == main.INTERNAL
        assert capsys.readouterr().err == ""


def test_a_terminal_shows_each_thing_that_is_done_and_nothing_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(rich.console, "Console", partial(Console, file=out, force_terminal=True, width=80))
    with Loading(silent=False) as loading:
        loading("loading the libraries")
        loading("reaching the server [::1]:7443")
        loading.done()
        assert loading._live is None
    for what in ("loading the libraries …", "reaching the server [::1]:7443 …"):
        assert what in out.getvalue()
    with Loading(silent=True) as loading:
        loading("anything")
    assert "anything" not in out.getvalue()


def test_elsewhere_only_the_first_thing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Loading(silent=False) as loading:
        loading("loading the libraries")
        loading("reaching the server")
    assert capsys.readouterr().err == LINE


@pytest.mark.usefixtures("nothing_loads")
def test_a_server_that_does_not_answer_is_told_before_torch_is_loaded(
    free: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "need_identity", lambda _: None)
    assert main.run(["generate", "the", "--server", f"127.0.0.1:{free}", "--base"]) == main.INTERNAL
    warning, line, *_ = capsys.readouterr().err.splitlines(keepends=True)
    assert f"Nothing listens at 127.0.0.1:{free}: " in warning
    assert line == LINE


@pytest.mark.usefixtures("nothing_loads")
def test_a_server_that_answers_is_no_warning(
    taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options.look_for_server(f"127.0.0.1:{taken}")
    options.look_for_server(f"relay://127.0.0.1:{taken}")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_behind_a_proxy_of_the_environment_is_not_looked_for(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unreachable(f"127.0.0.1:{free}") is not None
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert unreachable(f"127.0.0.1:{free}") is None


@pytest.mark.usefixtures("without_folders", "nothing_loads")
def test_a_port_of_the_gateway_in_use_is_told_before_torch_is_loaded(
    taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["gateway", "--server", "h:1", "--port", str(taken)]) == 2
    assert f"cannot listen at 127.0.0.1:{taken} (Address already in use)" in capsys.readouterr().err
