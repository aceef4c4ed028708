"""The quickstart's last question: a stream is read to its end, and one that breaks off is an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedsea.errors import FedseaError
from fedsea.evaluation import asking
from fedsea.evaluation.processes import Processes

Serve = Callable[..., str]


def event(text: str, ended: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": ended}]}).encode() + b"\n\n"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A gateway that answers with these bytes; its URL. What it was asked is in `serve.asked`."""
    servers: list[HTTPServer] = []

    def start(body: bytes, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                start.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Silent."""

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_pieces_are_shown_as_they_come_and_joined_at_the_end(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")  # is for the world, not for this machine
    url = serve(event("a") + event("") + event("é b") + event("", "length") + b"data: [DONE]\n\n")
    shown: list[str] = []
    assert asking.ask(url, "m", "the prompt", shown.append) == ("aé b", "length")
    assert shown == ["a", "", "é b", ""]
    asked = serve.asked
    assert (asked["model"], asked["prompt"], asked["stream"], asked["temperature"]) == ("m", "the prompt", True, 0)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (event("a"), 200, "broke off"),
        (event("a") + b'data: {"error": {"message": "secret"}}\n\n', 200, "gave no answer"),
        (b"data: no json\n\n", 200, "gave no answer"),
        (b'{"error": {"message": "secret"}}', 503, "status 503"),
    ],
)
def test_an_answer_that_is_not_whole_is_one_sentence(serve: Serve, body: bytes, status: int, says: str) -> None:
    with pytest.raises(FedseaError, match=says) as raised:
        asking.ask(serve(body, status), "m", "the prompt", lambda _: None)
    assert "gateway.log" in raised.value.message
    assert "secret" not in raised.value.message


def test_without_its_packages_no_gateway_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    with Processes(tmp_path) as processes:
        assert asking.start_gateway(tmp_path, "h:1", "clinic", processes) is None
    assert not list(tmp_path.iterdir())
