"""What a server that runs as its operator runs it says and keeps: none of the clients' text.

Its memory holds hidden states and gradients, from which text can be computed: that is what the audit is about. Here
it is shown that the text itself, or its tokens, never get there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedsea.client.inference import open_decoder
from fedsea.client.segments import ClientSegments
from fedsea.errors import FedseaError
from tests.support.canary import CANARY, TRUST, assert_absent, forms, found_in_memory, plant
from tests.support.federation import DEADLINE_S, Federation

NAME = "Plumbago Beacon 5512"
"""The federation's, which the server must hold."""


_LAUNCHER = """
import json, os, signal, sys
from fedsea.cli import main, server
from fedsea.model import adapters, loading
from fedsea.server import run
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    output, *arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        said = os.open(output, os.O_WRONLY)
        os.dup2(said, 1), os.dup2(said, 2)
        os.close(0), os.close(said)
        sys.exit(main.run(arguments))
    print(pid, flush=True)
"""
"""Runs a `fedsea` command for each line that it reads, in a fork of a process that has done nothing but import."""


class Launcher:
    """Starts servers: what they import, which takes longest, is imported once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, output: Path, *arguments: object) -> int:
        """A command with its output into a fifo; its process id."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(part) for part in (output, *arguments)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    one = Launcher()
    yield one
    one.process.kill()
    one.process.communicate()


class Operated:
    """`fedsea server`, and all that it said, at its most talkative."""

    def __init__(self, launcher: Launcher, fed: Federation) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.metrics = f"127.0.0.1:{free.getsockname()[1]}"
        self.said: list[str] = []
        self._listening, self._address = threading.Event(), ""
        options = ["--plan", fed.plan_file, "--listen", fed.address, "--run", fed.folder / "server", "--threads", "1"]
        options += ["--identity", fed.identities / "server", "--ca", fed.identities / "ca", "--metrics", self.metrics]
        self._output = fed.folder / "said"
        os.mkfifo(self._output)
        self.pid = launcher.start(self._output, "--debug", "server", *options)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._output.open() as output:  # until it ends
            for line in output:
                self.said.append(line)
                if " listening on " in line:
                    self._address = line.split()[-1]
                    self._listening.set()

    def address(self) -> str:
        """Where it listens, as soon as it does."""
        assert self._listening.wait(DEADLINE_S), "the server does not listen"
        return self._address

    def page(self) -> bytes:
        """The Prometheus page."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=DEADLINE_S) as answer:
            return bytes(answer.read())

    def end(self) -> str:
        """Ctrl-C; all that it said."""
        os.kill(self.pid, signal.SIGTERM)
        self.wait()
        return "".join(self.said)

    def kill(self) -> None:
        """At once, if it has not ended; its number may be another's then."""
        if self._reader.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        self._reader.join(DEADLINE_S)
        assert not self._reader.is_alive(), "the server does not end"


@contextmanager
def operated(launcher: Launcher, fed: Federation) -> Iterator[Operated]:
    server = Operated(launcher, fed)
    try:
        fed.address = server.address()
        yield server
    finally:
        server.kill()


def fail_in_the_middle(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client a leaves a step with an error, which is told to the server."""
    original = ClientSegments.head

    def poisoned(self: ClientSegments, batch, hidden, update, number):  # type: ignore[no-untyped-def]
        return original(self, batch, hidden * float("nan") if self.name == "a" else hidden, update, number)

    with monkeypatch.context() as patch:
        patch.setattr(ClientSegments, "head", poisoned)
        with pytest.raises(FedseaError, match="is not finite"):
            fed.start_client("a").finish()


@pytest.mark.parametrize("mode", TRUST)
def test_no_text_and_no_token_gets_into_the_servers_memory_metrics_or_log(
    federation: Callable[..., Federation], launcher, base_model, monkeypatch, mode
) -> None:
    fed = federation("a", "b", name=NAME, **TRUST[mode])
    plant(fed, "a")
    canary = forms(base_model)
    with operated(launcher, fed) as server:
        other = fed.start_client("b", evaluate=True)
        fail_in_the_middle(fed, monkeypatch)
        assert not found_in_memory(server.pid, canary), "after an error in the middle of a step"
        training = fed.start_client("a", evaluate=True)
        training.watch.wait_for(lambda: bool(training.watch.steps))
        assert not found_in_memory(server.pid, canary), "in the middle of the run"
        for part in (training, other):
            part.finish()
        with open_decoder(fed.client_options("a", data=())) as opened, opened.decoder.open(64) as sequences:
            sequences.extend([opened.tokenizer(CANARY)["input_ids"]])
            assert not found_in_memory(server.pid, canary), "while a session is open"
            page = server.page()
        assert found_in_memory(server.pid, [NAME.encode()]), "what the server must hold is found"
        assert found_in_memory(os.getpid(), canary), "what its owner holds is found"
        said = server.end()
    assert b"fedsea_inference_tokens_total" in page
    assert_absent("the metrics", page, canary)
    assert "client a stopped at step 0: NON_FINITE" in said
    assert_absent("the log", said.encode(), canary)
