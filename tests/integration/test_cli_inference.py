"""`fedsea generate` and `fedsea chat` against a running server, which goes on after its run."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fedsea.cli import main
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.inference import open_decoder
from fedsea.client.setup import ClientOptions
from fedsea.errors import CapacityError, TransportError
from tests.support.federation import DEADLINE_S, Federation, ServerThread

PROMPT = "the old ship"


pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture
def one(federation: Callable[..., Federation]) -> Federation:
    """A federation of one client, with its server."""
    made = federation("a", training={"rounds": 1, "steps_per_round": 2})
    made.start_server(exit_when_finished=False)
    return made


def command(name: str, one: Federation, *more: str) -> int:
    given = ["--server", one.address, "--identity", str(one.identities / "a"), "--run", str(one.folder / "a")]
    return main.run([name, *given, "--max-new-tokens", "10", "--threads", "1", *more])


def expected(options: ClientOptions) -> str:
    """The answer by the Python call."""
    with open_decoder(options) as opened:
        ids = opened.tokenizer(PROMPT)["input_ids"]
        chosen = GenerationSettings(max_new_tokens=10, stop_tokens=opened.stop_tokens)
        with generate(opened.decoder, ids, chosen) as generation:
            return str(opened.tokenizer.decode([token.id for token in generation], skip_special_tokens=True))


def on_loop(server: ServerThread, work: Any) -> Any:
    """Run a coroutine where the server's own run."""
    return asyncio.run_coroutine_threadsafe(work, server._loop).result(DEADLINE_S)


def wait_until_empty(server: ServerThread) -> None:
    """Until the server has no session any more."""
    gone = threading.Event()

    def look() -> None:
        assert server.service is not None
        if server.service.sessions.status()["sessions"] == 0:
            gone.set()
        else:
            server._loop.call_later(0.02, look)

    server._loop.call_soon_threadsafe(look)
    assert gone.wait(DEADLINE_S), "a session is left"


def test_a_finished_run_is_used_for_as_long_as_its_server_is_there(
    one: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    one.start_client("a").finish()
    assert one.server is not None
    assert one.server.service is not None
    on_loop(one.server, one.server.service.over.wait())  # the run is over: only a signal ends the server now
    text = expected(one.client_options("a", data=()))
    capsys.readouterr()

    assert command("generate", one, PROMPT) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{text}\n"
    loading, line = shown.err.splitlines()
    assert loading.startswith("Loading the libraries")
    assert "CAN reconstruct" in line
    assert PROMPT not in line

    one.server.stop()
    server = one.start_server(exit_when_finished=False)  # of a run that was finished before
    assert command("generate", one, PROMPT, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == text
    assert document["stats"]["bytes_sent"] > document["prompt_tokens"] * 32 * 4

    wait_until_empty(server)
    assert main.run(["status", "--server", one.address, "--identity", str(one.identities / "a")]) == 0
    assert "0 sessions with 0 sequences, 0 B of 1.07 GB" in " ".join(capsys.readouterr().out.split())


def test_a_chat_keeps_one_session_and_gives_it_back(
    one: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one.server is not None
    assert one.server.service is not None
    sessions, most = one.server.service.sessions, 0
    original = sessions._ran

    def ran(results: Any) -> None:
        nonlocal most
        most = max(most, sessions.status()["sequences"])
        original(results)

    monkeypatch.setattr(sessions, "_ran", ran)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\nand then\n/stats\n")))
    assert command("chat", one, "--base") == 0
    err = capsys.readouterr().err
    assert "all 2 answers: " in err
    assert "received 0 B" not in err
    assert most == 1
    wait_until_empty(one.server)


def test_a_server_without_room_is_one_sentence_and_its_exit_code(
    federation: Callable[..., Federation], capsys: pytest.CaptureFixture[str]
) -> None:
    fed = federation("a", inference={"max_sequences": 1})
    fed.start_server(exit_when_finished=False)
    with open_decoder(fed.client_options("a", data=()), base=True) as opened, opened.decoder.open(8) as sequences:
        sequences.extend([[5]])
        assert command("generate", fed, PROMPT, "--base", "--retry-for", "0") == CapacityError.exit_code
    shown = capsys.readouterr()
    assert shown.out.strip() == ""
    assert "close some, or try again later" in shown.err.splitlines()[-1]


def test_a_server_that_is_not_there_is_one_sentence_and_its_exit_code(
    one: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one.server is not None
    one.server.stop()
    assert command("generate", one, PROMPT, "--base", "--json", "--retry-for", "0") == TransportError.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "TRANSPORT"
