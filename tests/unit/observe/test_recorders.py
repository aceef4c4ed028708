"""What goes into the run folders of a client and of a server."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console

from fedsea.observe.metrics import ServerMetrics
from fedsea.observe.progress import ServerDisplay
from fedsea.observe.recorders import ClientRecorder, ServerRecorder
from fedsea.observe.run_log import read_lines
from fedsea.plan import parse_plan

PLAN = parse_plan({"model": {"path": "m"}, "clients": [{"name": "clinic"}, {"name": "bank"}]})


@dataclass(frozen=True)
class Step:
    step: int = 4
    round: int = 1
    num_steps: int = 10
    mean_loss: float = 2.5
    num_target_tokens: int = 7
    num_tokens: int = 9
    seconds: dict[str, float] = field(default_factory=lambda: {"input": 0.25, "trunk": 1.5})


class Link:
    num_bytes = (10, 20)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = read_lines(folder / "metrics.jsonl")
    for line in found:
        del line["time"]
    return found


def test_a_client_records_plan_and_steps_with_phases_and_bytes(tmp_path: Path) -> None:
    with ClientRecorder(tmp_path, tensorboard=False) as recorder:
        recorder.begin(PLAN, "clinic", Link())
        recorder.step(Step())
    assert (tmp_path / "plan.json").exists()
    assert lines(tmp_path) == [
        {"kind": "start", "client": "clinic", "plan_sha256": PLAN.sha256()},
        {
            "kind": "step",
            "step": 4,
            "round": 1,
            "mean_loss": 2.5,
            "num_target_tokens": 7,
            "num_tokens": 9,
            "bytes_up": 10,
            "bytes_down": 20,
            "seconds_input": 0.25,
            "seconds_trunk": 1.5,
        },
    ]


def test_a_client_that_never_gets_a_plan_leaves_no_folder(tmp_path: Path) -> None:
    with ClientRecorder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def status(step: int, connected: list[str]) -> dict[str, Any]:
    return {
        "next_step": step,
        "num_steps": 100,
        "rounds_done": 0,
        "connected": connected,
        "waiting_for": [],
        "target_tokens": step * 10,
        "bytes_sent": 2,
        "bytes_received": 1,
        "bytes_sent_by_kind": {"Output": 2},
        "bytes_received_by_kind": {"Forward": 1},
        "engine_s": {"forward": step / 10},
        "errors": {"AUTH": step},
        "inference": {
            **{"sessions": 1, "sequences": 2, "kv_bytes": 3, "kv_bytes_limit": 4},
            **{"pages": 5, "tokens": step * 6, "batches": step},
        },
    }


def test_a_server_records_who_comes_and_goes_and_each_advance(tmp_path: Path) -> None:
    clock, registry = [0.0], CollectorRegistry()
    display = ServerDisplay(PLAN, quiet=True, console=Console(file=io.StringIO()))
    metrics = ServerMetrics(registry)
    with ServerRecorder(tmp_path, display, metrics, tensorboard=False, clock=lambda: clock[0]) as recorder:
        recorder(status(5, []))
        recorder(status(5, ["clinic"]))
        clock[0] = 3.0
        recorder(status(7, ["clinic", "bank"]))
        recorder(status(7, ["bank"]))
    kinds = [(line["kind"], line.get("client"), line["step"]) for line in lines(tmp_path)]
    assert kinds == [
        ("start", None, 5),
        ("joined", "clinic", 5),
        ("joined", "bank", 7),
        ("progress", None, 7),
        ("left", "clinic", 7),
    ]
    assert lines(tmp_path)[3]["step_seconds"] == 1.5
    assert registry.get_sample_value("fedsea_step_seconds_count") == 2
    assert registry.get_sample_value("fedsea_bytes_total", {"direction": "up", "kind": "Forward"}) == 1
    assert registry.get_sample_value("fedsea_engine_seconds_total", {"phase": "forward"}) == 0.7
    assert registry.get_sample_value("fedsea_errors_total", {"code": "AUTH"}) == 7
    assert registry.get_sample_value("fedsea_inference_sessions") == 1
    assert registry.get_sample_value("fedsea_inference_sequences") == 2
    assert registry.get_sample_value("fedsea_inference_kv_bytes") == 3
    assert registry.get_sample_value("fedsea_inference_kv_limit_bytes") == 4
    assert registry.get_sample_value("fedsea_inference_tokens_total") == 42
    assert registry.get_sample_value("fedsea_inference_batches_total") == 7
