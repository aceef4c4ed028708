"""What a server that runs as its operator runs it says and keeps: none of the clients' text.

Its memory holds hidden states and gradients, from which text can be computed: that is what the audit is about. Here
it is shown that the text itself, or its tokens, never get there.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fedsea.client.inference import open_decoder
from fedsea.client.segments import ClientSegments
from fedsea.errors import FedseaError
from tests.support.canary import CANARY, TRUST, assert_absent, forms, found_in_memory, plant
from tests.support.federation import DEADLINE_S, Federation

NAME = "Plumbago Beacon 5512"
"""The federation's, which the server must hold."""


class Operated:
    """`fedsea server`, and all that it said, at its most talkative."""

    def __init__(self, fed: Federation) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.metrics = f"127.0.0.1:{free.getsockname()[1]}"
        self.said: list[str] = []
        self._listening, self._address = threading.Event(), ""
        options = ["--plan", fed.plan_file, "--listen", fed.address, "--run", fed.folder / "server", "--threads", "1"]
        options += ["--identity", fed.identities / "server", "--ca", fed.identities / "ca", "--metrics", self.metrics]
        call = [sys.executable, "-m", "fedsea", "--debug", "server", *options]
        self.process = subprocess.Popen(
            [str(part) for part in call], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
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
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return "".join(self.said)


@contextmanager
def operated(fed: Federation) -> Iterator[Operated]:
    server = Operated(fed)
    try:
        fed.address = server.address()
        yield server
    finally:
        server.process.kill()
        server.process.wait(DEADLINE_S)


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
    federation: Callable[..., Federation], base_model, monkeypatch, mode
) -> None:
    fed = federation("a", "b", name=NAME, **TRUST[mode])
    plant(fed, "a")
    canary = forms(base_model)
    with operated(fed) as server:
        other = fed.start_client("b", evaluate=True)
        fail_in_the_middle(fed, monkeypatch)
        assert not found_in_memory(server.process.pid, canary), "after an error in the middle of a step"
        training = fed.start_client("a", evaluate=True)
        training.watch.wait_for(lambda: bool(training.watch.steps))
        assert not found_in_memory(server.process.pid, canary), "in the middle of the run"
        for part in (training, other):
            part.finish()
        with open_decoder(fed.client_options("a", data=())) as opened, opened.decoder.open(64) as sequences:
            sequences.extend([opened.tokenizer(CANARY)["input_ids"]])
            assert not found_in_memory(server.process.pid, canary), "while a session is open"
            page = server.page()
        assert found_in_memory(server.process.pid, [NAME.encode()]), "what the server must hold is found"
        assert found_in_memory(os.getpid(), canary), "what its owner holds is found"
        said = server.end()
    assert b"fedsea_inference_tokens_total" in page
    assert_absent("the metrics", page, canary)
    assert "client a stopped at step 0: NON_FINITE" in said
    assert_absent("the log", said.encode(), canary)
