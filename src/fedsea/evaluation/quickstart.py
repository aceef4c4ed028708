"""`fedsea quickstart`: a whole federation on one machine, compared with its alternatives.

One server and three clients run as processes of their own on loopback, with a certificate authority made for the
occasion. Beside them, other processes train what the federation is to be compared with: each silo alone, and a
central model on the pooled text, from the same base model with the same settings. This process evaluates the models
as they are done. At the end an application asks the model through a gateway at one of the clients.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsea.errors import FedseaError
from fedsea.evaluation import asking
from fedsea.evaluation.preparation import CLIENTS, prepare
from fedsea.evaluation.processes import Processes
from fedsea.evaluation.report import Cells, write_report
from fedsea.observe.run_log import read_lines
from fedsea.plan import FederationPlan, load_plan, trust_statement

if TYPE_CHECKING:
    import torch

    from fedsea.evaluation.comparison import Comparison, Losses

log = logging.getLogger(__name__)

_CENTRAL = "central"
_MODELS = ("base", *CLIENTS, _CENTRAL, "federated")
_PATIENCE_S = 600.0

Progress = Callable[[str, int, int], None]
"""Told (what, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class QuickstartOptions:
    """What a quickstart may be asked for.

    Attributes:
        folder: Gets everything: authority, identities, plan, runs, logs, report.
        steps: Optimizer steps in all; None takes the shipped plan's.
        rows: Of each silo, the first ones; None takes all. With few, the losses say little.
    """

    folder: Path
    steps: int | None = None
    rows: int | None = None


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
    begun: Callable[[Processes], None] = lambda _: None,
) -> QuickstartResult:
    """Run the whole comparison, ask the model something, and write the page.

    Args:
        options: See `QuickstartOptions`.
        progress: Told how far each part is.
        present: Given the result before the model is asked: the answer is empty yet, and there is no page.
        show: Given the answer, piece by piece as it comes.
        audit: Asked, when the answer is there, what the server could have read, for the page: a table of text, its
            first row the heading.
        begun: Told once, when plan and model are there and the federation begins; it may start more processes.

    Raises:
        ConfigError: The folder holds something already.
        FedseaError: A part failed; the message says which, and where its log is.
    """
    started = time.monotonic()
    folder = options.folder.resolve()
    prepare(folder, options.steps, options.rows)
    plan = load_plan(folder / "plan.toml")
    log.warning("%s", trust_statement(plan))
    progress("preparation", 1, 2)
    with Processes(folder / "logs") as processes:
        processes.load_libraries()
        _load_libraries()  # on the other core
        ready = _start_server(folder, processes)
        comparison = _open(folder, plan)
        address = processes.wait_for(ready, timeout_s=120)
        _start_clients(folder, address, processes)
        progress("preparation", 2, 2)
        watcher = _Watcher(folder, plan, processes, progress)
        with watcher:
            begun(processes)
            losses, url = _compare(folder, plan, address, comparison, processes, watcher)
        prompt = comparison.held_out_prompt(CLIENTS[0])
        sample = {"prompt": prompt, "answer": "", "through": "process" if url is None else "gateway"}
        sample["finish_reason"] = ""
        seconds = {part: watcher.seconds[part] for part in ("federation", "comparison")}
        result = _result(folder, losses, sample, seconds)
        present(result)
        if url is None:
            parameters = _parameters(folder, plan, "federated")
            answer, ended = comparison.generate(parameters, prompt, asking.MOST_TOKENS)
            show(answer)
        else:
            answer, ended = asking.ask(processes.wait_for(url, timeout_s=120), plan.name, prompt, show)
        result = replace(result, sample=sample | {"answer": answer, "finish_reason": ended})
        reading = audit(result)
    result = replace(result, seconds=result.seconds | {"all": round(time.monotonic() - started, 1)})
    curves = {name: read_lines(folder / "runs" / name / "metrics.jsonl") for name in CLIENTS}
    write_report(result, plan, curves, reading)
    return result


def _load_libraries() -> None:
    """What this process computes with; takes several seconds, so that nothing else of this module needs it."""
    import torch

    import fedsea.evaluation.comparison  # noqa: F401 (for what it brings along)

    torch.set_num_threads(1)


def _open(folder: Path, plan: FederationPlan) -> Comparison:
    """The comparison; the pooled training text is written, which belongs to it."""
    from fedsea.evaluation.comparison import Comparison

    comparison = Comparison(plan, {name: folder / "silos" / f"{name}.jsonl" for name in CLIENTS})
    comparison.pool(folder / "pooled-train.jsonl")
    return comparison


def _start_server(folder: Path, processes: Processes) -> Path:
    """Start the server; the file that gets its address. It stays until it is ended, as a real one does."""
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
    return ready


def _start_clients(folder: Path, address: str, processes: Processes) -> None:
    for name in CLIENTS:
        processes.start(
            name,
            [
                *("train", "--server", address, "--identity", str(folder / "clients" / name), "--threads", "1"),
                *("--data", str(folder / "silos" / f"{name}.jsonl"), "--model", str(folder / "model")),
                *("--run", str(folder / "runs" / name), "--json", "--quiet"),
            ],
        )


def _alone(name: str) -> str:
    """How the process and the run folder are called that train a model without the federation."""
    return f"{name}-alone"


def _start_alone(folder: Path, name: str, processes: Processes) -> None:
    central = name == _CENTRAL
    data = folder / "pooled-train.jsonl" if central else folder / "silos" / f"{name}.jsonl"
    processes.start(
        _alone(name),
        [
            *("train", "--alone", "--plan", str(folder / ("central.toml" if central else "plan.toml"))),
            *("--name", name, "--data", str(data), "--run", str(folder / "runs" / _alone(name))),
            *("--no-eval", "--threads", "1", "--quiet"),
        ],
    )


def _compare(
    folder: Path, plan: FederationPlan, address: str, comparison: Comparison, processes: Processes, watcher: _Watcher
) -> tuple[dict[str, Losses], Path | None]:
    """Train the other models beside the federation, and evaluate each model as soon as it is there.

    Returns:
        Model to losses, and what `start_gateway` gave: the gateway loads while the rest is under way.
    """
    lines = [list(CLIENTS), [_CENTRAL]]  # silos one after the other, and beside them the central model
    for line in lines:
        _start_alone(folder, line[0], processes)
    losses: dict[str, Losses] = {}
    url: Path | None = None
    over = False
    while len(losses) < len(_MODELS):
        done = [line for line in lines if line and processes.ended(_alone(line[0]))]
        ends = not over and all(processes.ended(name) for name in CLIENTS)
        processes.check()
        for line in done:
            line.pop(0)
            if line:
                _start_alone(folder, line[0], processes)
        if ends:
            over, url = True, asking.start_gateway(folder, address, CLIENTS[0], processes)
        missing = [name for line in lines for name in line] + ([] if over else ["federated"])
        there = [name for name in _MODELS if name not in losses and name not in missing]
        if there:
            losses[there[0]] = comparison.losses(_parameters(folder, plan, there[0]))
            watcher.progress("evaluation", len(losses), len(_MODELS))
        elif time.monotonic() - watcher.moved > _PATIENCE_S:
            raise FedseaError(f"Nothing went on for {_PATIENCE_S:g} s; see the logs in {folder / 'logs'}.")
        else:
            time.sleep(0.05)
    return {name: losses[name] for name in _MODELS}, url


def _parameters(folder: Path, plan: FederationPlan, name: str) -> Mapping[str, torch.Tensor] | None:
    """A model's trained parameters; None for the base model, which has none."""
    from fedsea.evaluation.comparison import federated, trained_alone

    if name == "base":
        return None
    return (
        federated(folder / "runs" / "server", plan)
        if name == "federated"
        else trained_alone(folder / "runs" / _alone(name))
    )


class _Watcher:
    """Looks at the metrics of all trainings while this process is busy, and notes how long they take.

    Attributes:
        seconds: Part to wall seconds since the federation's start, when it is over.
        moved: When anything was last seen to have gone on.
    """

    def __init__(self, folder: Path, plan: FederationPlan, processes: Processes, progress: Progress) -> None:
        self._metrics = {"federation": folder / "runs" / CLIENTS[0] / "metrics.jsonl"}
        for name in (*CLIENTS, _CENTRAL):
            part = name if name == _CENTRAL else f"{name} alone"
            self._metrics[part] = folder / "runs" / _alone(name) / "metrics.jsonl"
        self._parts = {"federation": CLIENTS, "comparison": tuple(_alone(name) for name in (CLIENTS[-1], _CENTRAL))}
        self._plan = plan
        self._processes = processes
        self.progress = progress
        self._steps: dict[str, int] = {}
        self._started = self.moved = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        for part, metrics in self._metrics.items():
            if self._steps.get(part) == self._plan.num_steps or not metrics.exists():
                continue
            steps = sum(line["kind"] == "step" for line in read_lines(metrics))
            if steps != self._steps.get(part):
                self.progress(part, steps, self._plan.num_steps)
                self._steps[part] = steps
                self.moved = time.monotonic()
        for part, names in self._parts.items():
            if part not in self.seconds and all(self._processes.ended(name) for name in names):
                self.seconds[part] = time.monotonic() - self._started

    def _work(self) -> None:
        while not self._stopped.wait(0.3):
            self._look()


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
