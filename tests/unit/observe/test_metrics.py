"""Prometheus metrics, and the log."""

import json
import logging
import socket
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from fedsea.errors import ConfigError
from fedsea.observe.logging import configure
from fedsea.observe.metrics import ServerMetrics, serve_metrics
from fedsea.observe.snapshots import ServerSnapshot


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def snapshot(tokens: int) -> ServerSnapshot:
    return ServerSnapshot(7, 20, 1, ("clinic", "bank"), (), tokens, 0, 0)


def test_gauges_follow_and_counters_grow_by_the_difference() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    metrics.update(snapshot(100))
    metrics.update(snapshot(150))
    metrics.bytes("up", "Forward", 10)
    metrics.bytes("up", "Forward", 30)
    metrics.bytes("up", "Forward", 5)  # a new process's totals
    metrics.errors("AUTH", 1)
    metrics.errors("AUTH", 1)
    metrics.engine_seconds("forward", 0.5)
    metrics.step_seconds(0.2)
    assert registry.get_sample_value("fedsea_step") == 7
    assert registry.get_sample_value("fedsea_round") == 1
    assert registry.get_sample_value("fedsea_clients_connected") == 2
    assert registry.get_sample_value("fedsea_tokens_total") == 150
    assert registry.get_sample_value("fedsea_bytes_total", {"direction": "up", "kind": "Forward"}) == 35
    assert registry.get_sample_value("fedsea_errors_total", {"code": "AUTH"}) == 1
    assert registry.get_sample_value("fedsea_engine_seconds_total", {"phase": "forward"}) == 0.5
    assert registry.get_sample_value("fedsea_step_seconds_count") == 1


def test_metrics_are_served_while_the_block_runs_and_the_port_is_free_after() -> None:
    port = free_port()
    for _ in range(2):
        with serve_metrics("127.0.0.1", port) as metrics:
            metrics.update(snapshot(5))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert "fedsea_step 7.0" in answer.read().decode()


def test_a_port_in_use_names_the_option() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(ConfigError, match="--metrics"), serve_metrics("127.0.0.1", sock.getsockname()[1]):
            pass


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What was logged; `configure` is undone afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("fedsea").setLevel(logging.NOTSET)


def raise_and_log() -> None:
    try:
        int("patient 17")
    except ValueError:
        logging.getLogger("fedsea.somewhere").exception("it failed")


def test_the_log_is_json_lines_when_asked(log: Callable[[], str]) -> None:
    configure("info", json=True)
    logging.getLogger("fedsea.somewhere").info("hello %s", "you")
    entry = json.loads(log())
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "fedsea.somewhere", "hello you")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_foreign_exceptions_message_is_kept_out_of_the_log(log: Callable[[], str], as_json: bool) -> None:
    configure("info", json=as_json)
    raise_and_log()
    written = log()
    assert "ValueError at test_metrics.py" in written
    assert "patient" not in written


def test_debug_shows_the_trace(log: Callable[[], str]) -> None:
    configure("debug")
    raise_and_log()
    assert "Traceback" in log()


def test_other_libraries_are_heard_from_warning_on(log: Callable[[], str]) -> None:
    configure("debug")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("trouble")
    logging.getLogger("fedsea.x").debug("detail")
    lines = log().splitlines()
    assert [line.split(": ")[-1] for line in lines] == ["trouble", "detail"]
