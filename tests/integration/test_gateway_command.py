"""`fedsea gateway` as a user starts and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import openai
import pytest

from fedsea.cli import gateway as command
from fedsea.cli import options
from fedsea.errors import ConfigError
from tests.support.federation import DEADLINE_S, Federation

pytestmark = pytest.mark.usefixtures("restored")


def _arguments(fed: Federation) -> list[str]:
    where = ["--server", fed.address, "--identity", str(fed.identities / "a"), "--base", "--threads", "1"]
    return ["gateway", *where, "--port", "0", "--json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_command_serves_with_the_key_of_the_environment_until_it_is_told_to_end(
    federation: Callable[..., Federation], number: signal.Signals
) -> None:
    fed = federation("a")
    fed.start_server(exit_when_finished=False)
    call = [sys.executable, "-c", "from fedsea.cli.main import main; main()", *_arguments(fed), "--name", "notes"]
    with subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FEDSEA_API_KEY": "key of the environment"},
    ) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["model"] == "notes"
            with openai.OpenAI(base_url=told["base_url"], api_key="wrong", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
                client.api_key = "key of the environment"
                answer = client.completions.create(model="notes", prompt="the ledger", max_tokens=3)
                assert answer.usage is not None
                assert answer.usage.completion_tokens <= 3
            process.send_signal(number)
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "the ledger" not in errors
    assert "key of the environment" not in errors


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--host", "0.0.0.0"], "needs an API key"),
        (["--host", "no.such.host.invalid"], "needs an API key"),
        (["--api-key", " "], "is empty"),
        (["--api-key", "schlüssel"], "No client could send"),
        (["--drafter", "nothing-here"], "--drafter"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_connection(
    extra: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsea.cli import main

    monkeypatch.delenv("FEDSEA_API_KEY", raising=False)
    monkeypatch.setattr(options, "need_identity", lambda _: None)
    monkeypatch.setattr(options, "need_run", lambda _: None)
    assert main.run(["gateway", "--server", "127.0.0.1:9", "--port", "0", "--json", *extra]) == ConfigError.exit_code
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == "CONFIG"
    assert sentence in error["message"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"\.\[gateway\]"):
        command._check_host("127.0.0.1", None, 0)


def test_gateway_is_not_loaded_for_other_commands() -> None:
    script = "import sys, fedsea.cli.main; sys.exit(any(n in sys.modules for n in ('starlette', 'uvicorn', 'torch')))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
