"""`fedsea quickstart`: a whole federation on one machine, compared with its alternatives.

One server and three clients run as processes of their own on loopback, with a certificate authority made for the
occasion. Beside them, this process trains what the federation is to be compared with: each silo alone, and a
central model on the pooled text, from the same base model with the same settings. At the end an application asks the
model through a gateway at one of the clients.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedsea.client.run import train_alone
from fedsea.client.setup import ClientOptions
from fedsea.client.state import ClientStore
from fedsea.evaluation import asking
from fedsea.evaluation.comparison import Comparison, Losses
from fedsea.evaluation.preparation import CLIENTS, prepare
from fedsea.evaluation.processes import Processes
from fedsea.evaluation.report import Cells, write_report
from fedsea.observe.run_log import read_lines
from fedsea.plan import FederationPlan, load_plan, trust_statement
from fedsea.server.state import ServerStore
from fedsea.storage import CheckpointStore

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told (what, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class QuickstartOptions:
    """What a quickstart may be asked for.

    Attributes:
        folder: Gets everything: authority, identities, plan, runs, logs, report.
        steps: Optimizer steps in all; None takes the shipped plan's.
    """

    folder: Path
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class QuickstartResult:
    """What a quickstart found out.

    Attributes:
        val_loss: Pooled held-out loss in nats per target token: "base", "alone" (by silo), "federated", "central".
        by_silo: Model to silo to loss.
        bytes_by_kind: Kind of message to bytes, over all clients.
        phases_s: Phase to seconds, summed over the clients' steps.
        seconds: Wall time by part; of "all" when everything is done.
        sample: A prompt, the federation's greedy answer, why that ended ("finish_reason": "stop", or "length" where it
            was cut off), and what was asked ("through"): "gateway", or "process" where the gateway's packages are not
            installed.
        report: The HTML page.
    """

    val_loss: dict[str, Any]
    by_silo: dict[str, dict[str, float]]
    bytes_by_kind: dict[str, int]
    phases_s: dict[str, float]
    seconds: dict[str, float]
    sample: dict[str, str]
    report: Path

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"report": str(self.report)})


def run(
    options: QuickstartOptions,
    progress: Progress = lambda *_: None,
    present: Callable[[QuickstartResult], None] = lambda _: None,
    show: Callable[[str], None] = lambda _: None,
    audit: Callable[[QuickstartResult], Cells] = lambda _: (),
) -> QuickstartResult:
    """Run the whole comparison, ask the model something, and write the page.

    Args:
        options: See `QuickstartOptions`.
        progress: Told how far each part is.
        present: Given the result before the model is asked: the answer is empty yet, and there is no page.
        show: Given the answer, piece by piece as it comes.
        audit: Asked, when the answer is there, what the server could have read, for the page: a table of text, its
            first row the heading.

    Raises:
        ConfigError: The folder holds something already.
        FedseaError: A part failed; the message says which, and where its log is.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    folder = options.folder.resolve()
    prepare(folder, options.steps)
    plan = load_plan(folder / "plan.toml")
    log.warning("%s", trust_statement(plan))
    progress("preparation", 1, 2)
    with Processes(folder / "logs") as processes:
        address = _start_federation(folder, plan, processes)
        progress("preparation", 2, 2)
        watcher = _Watcher(folder, plan, processes, progress)
        with watcher:
            comparison = Comparison(plan, {name: folder / "silos" / f"{name}.jsonl" for name in CLIENTS})
            models: dict[str, Mapping[str, torch.Tensor] | None] = {"base": None}
            for name in CLIENTS:
                models[name] = _train_alone(folder, "plan.toml", name, f"silos/{name}.jsonl", progress)
            _pool(folder, comparison)
            models["central"] = _train_alone(folder, "central.toml", "central", "pooled-train.jsonl", progress)
            others_s = time.monotonic() - started
            processes.wait(CLIENTS, timeout_s=600)
        url = asking.start_gateway(folder, address, CLIENTS[0], processes)  # loads while this process evaluates
        models["federated"] = ServerStore.peek(folder / "runs" / "server", plan)
        losses = {}
        for number, (name, parameters) in enumerate(models.items()):
            losses[name] = comparison.losses(parameters)
            progress("evaluation", number + 1, len(models))
        seconds = {"federation": watcher.seconds, "comparison": others_s}
        prompt = _held_out_prompt(folder, comparison, CLIENTS[0])
        sample = {"prompt": prompt, "answer": "", "through": "process" if url is None else "gateway"}
        sample["finish_reason"] = ""
        result = _result(folder, losses, sample, seconds)
        present(result)
        if url is None:
            answer, ended = comparison.generate(models["federated"], prompt, asking.MOST_TOKENS)
            show(answer)
        else:
            answer, ended = asking.ask(processes.wait_for(url, timeout_s=120), plan.name, prompt, show)
    result = replace(result, sample=sample | {"answer": answer, "finish_reason": ended})
    reading = audit(result)
    result = replace(result, seconds=result.seconds | {"all": round(time.monotonic() - started, 1)})
    curves = {name: read_lines(folder / "runs" / name / "metrics.jsonl") for name in CLIENTS}
    write_report(result, plan, curves, reading)
    return result


def _start_federation(folder: Path, plan: FederationPlan, processes: Processes) -> str:
    """Start the server and all clients; the server's address. It stays until it is ended, as a real one does."""
    ready = folder / "runs" / "address"
    ready.parent.mkdir()
    processes.start(
        "server",
        [
            *("server", "--plan", str(folder / "plan.toml"), "--listen", "127.0.0.1:0", "--threads", "1"),
            *("--identity", str(folder / "server-identity"), "--ca", str(folder / "ca")),
            *("--run", str(folder / "runs" / "server"), "--ready-file", str(ready), "--quiet", "--metrics", "off"),
        ],
    )
    address = processes.wait_for(ready, timeout_s=120)
    for name in plan.client_names:
        processes.start(
            name,
            [
                *("train", "--server", address, "--identity", str(folder / "clients" / name), "--threads", "1"),
                *("--data", str(folder / "silos" / f"{name}.jsonl"), "--model", str(folder / "model")),
                *("--run", str(folder / "runs" / name), "--json", "--quiet"),
            ],
        )
    return address


class _Watcher:
    """Looks at the federation's metrics while this process is busy, and notes when it is over."""

    def __init__(self, folder: Path, plan: FederationPlan, processes: Processes, progress: Progress) -> None:
        self._metrics = folder / "runs" / CLIENTS[0] / "metrics.jsonl"
        self._plan = plan
        self._processes = processes
        self._progress = progress
        self._started = time.monotonic()
        self.seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        if self._metrics.exists():
            steps = sum(line["kind"] == "step" for line in read_lines(self._metrics))
            self._progress("federation", steps, self._plan.num_steps)
        if not self.seconds and not any(self._processes.alive(name) for name in CLIENTS):
            self.seconds = time.monotonic() - self._started

    def _work(self) -> None:
        while not self._over.wait(0.3):
            self._look()


class _Steps:
    """An observer that only counts."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what = what
        self._progress = progress

    def step(self, report: Any) -> None:
        self._progress(self._what, report.step + 1, report.num_steps)

    def evaluation(self, report: Any) -> None:
        """Nothing to count."""


def _train_alone(folder: Path, plan: str, name: str, data: str, progress: Progress) -> dict[str, torch.Tensor]:
    what = "central" if name == "central" else f"{name} alone"
    run_folder = folder / "runs" / f"{name}-alone"
    options = ClientOptions("", Path(), (folder / data,), run_folder, evaluate=False)
    train_alone(folder / plan, name, options, _Steps(what, progress))
    found = ClientStore.peek(run_folder) or {}
    trunk = CheckpointStore(run_folder / "trunk", read_only=True).latest()
    tensors = {**found, **(trunk[1] if trunk else {})}
    prefix = "parameter."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _pool(folder: Path, comparison: Comparison) -> None:
    """Write the union of the silos' training splits, in their order."""
    with (folder / "pooled-train.jsonl").open("w", encoding="utf-8") as pooled:
        for name, silo in comparison.silos.items():
            lines = (folder / "silos" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            pooled.writelines(lines[row] + "\n" for row in silo.train().rows)


def _held_out_prompt(folder: Path, comparison: Comparison, name: str) -> str:
    row = int(comparison.silos[name].heldout().rows[0])
    line = (folder / "silos" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[row]
    return str(json.loads(line)["prompt"])


def _result(
    folder: Path, losses: dict[str, Losses], sample: dict[str, str], seconds: dict[str, float]
) -> QuickstartResult:
    summaries = [_summary(folder / "logs" / f"{name}.log") for name in CLIENTS]
    val_loss = {
        "base": losses["base"].pooled,
        "alone": {name: losses[name].pooled for name in CLIENTS},
        "federated": losses["federated"].pooled,
        "central": losses["central"].pooled,
    }
    return QuickstartResult(
        val_loss,
        {name: item.by_silo for name, item in losses.items()},
        _added([summary["bytes_by_kind"] for summary in summaries]),
        _added([summary["phases_s"] for summary in summaries]),
        {part: round(value, 1) for part, value in seconds.items()},
        sample,
        folder / "report.html",
    )


def _summary(log: Path) -> dict[str, Any]:
    """The JSON line that ends a client's output."""
    summary: dict[str, Any] = json.loads(log.read_text().strip().splitlines()[-1])
    return summary


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(part.get(key, 0) for part in parts) for key in sorted({key for part in parts for key in part})}
