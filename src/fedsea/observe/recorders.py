"""What of a run goes into its folder and to Prometheus: one recorder at a client, one at the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsea.observe.metrics import ServerMetrics
from fedsea.observe.observers import EvaluationLike, Link, StepLike
from fedsea.observe.progress import ServerDisplay
from fedsea.observe.run_log import RunLog
from fedsea.observe.snapshots import InferenceSnapshot, ServerSnapshot
from fedsea.plan import FederationPlan


class ClientRecorder:
    """An observer that writes a client's run folder; opened when the plan is agreed on.

    Args:
        folder: Run folder.
        tensorboard: Also write scalars for TensorBoard.
    """

    def __init__(self, folder: Path, tensorboard: bool = True) -> None:
        self._folder = folder
        self._tensorboard = tensorboard
        self._log: RunLog | None = None
        self._link: Link | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def begin(self, plan: FederationPlan, name: str, link: Link | None = None) -> None:
        """The plan is agreed on, and the run folder is this process's."""
        self._link = link
        log = self._opened()
        log.write_plan(plan)
        log.write("start", client=name, plan_sha256=plan.sha256())

    def step(self, report: StepLike) -> None:
        """A step was applied."""
        up, down = self._link.num_bytes if self._link is not None else (0, 0)
        phases = {f"seconds_{phase}": round(seconds, 6) for phase, seconds in report.seconds.items()}
        self._opened().write(
            "step",
            step=report.step,
            round=report.round,
            mean_loss=report.mean_loss,
            num_target_tokens=report.num_target_tokens,
            num_tokens=report.num_tokens,
            bytes_up=up,
            bytes_down=down,
            **phases,
        )

    def evaluation(self, report: EvaluationLike) -> None:
        """The held-out split was evaluated."""
        self._opened().write(
            "evaluation",
            next_step=report.next_step,
            mean_loss=report.mean_loss,
            num_target_tokens=report.num_target_tokens,
        )

    def waiting(self, names: tuple[str, ...]) -> None:
        """Not recorded."""

    def bytes(self, up: int, down: int) -> None:
        """Not recorded: bytes are read from the link with every step."""

    def _opened(self) -> RunLog:
        if self._log is None:
            self._log = RunLog(self._folder, self._tensorboard)
        return self._log


class ServerRecorder:
    """Takes a server's status a few times a second; tells display and metrics, and logs what changed.

    Args:
        folder: Run folder.
        display: Shown every status.
        metrics: The Prometheus endpoint, if there is one.
        tensorboard: Also write scalars for TensorBoard.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        display: ServerDisplay,
        metrics: ServerMetrics | None = None,
        tensorboard: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._display = display
        self._metrics = metrics
        self._tensorboard = tensorboard
        self._clock = clock
        self._log: RunLog | None = None
        self._before: ServerSnapshot | None = None
        self._stepped_at = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    @property
    def last(self) -> ServerSnapshot | None:
        """The newest snapshot."""
        return self._before

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Take what `server.service.Service.status` gives."""
        snapshot = ServerSnapshot(
            step=status["next_step"],
            num_steps=status["num_steps"],
            round=status["rounds_done"],
            connected=tuple(status["connected"]),
            waiting_for=tuple(status["waiting_for"]),
            tokens=status["target_tokens"],
            bytes_up=status["bytes_received"],
            bytes_down=status["bytes_sent"],
            inference=_inference(status.get("inference")),
            refused=status.get("refused", {}),
            using=tuple(status.get("using", ())),
        )
        before, self._before = self._before, snapshot
        self._display.update(snapshot)
        seconds = self._step_seconds(before, snapshot)
        if self._metrics is not None:
            self._measure(self._metrics, status, before, seconds)
            self._metrics.update(snapshot)
        self._record(before, snapshot, seconds)

    def _step_seconds(self, before: ServerSnapshot | None, snapshot: ServerSnapshot) -> float | None:
        """Mean wall time of the steps since the last status; None if there was none."""
        if before is not None and snapshot.step <= before.step:
            return None
        now = self._clock()
        since, self._stepped_at = now - self._stepped_at, now
        return None if before is None else since / (snapshot.step - before.step)

    @staticmethod
    def _measure(
        metrics: ServerMetrics, status: Mapping[str, Any], before: ServerSnapshot | None, seconds: float | None
    ) -> None:
        for kind, total in status["bytes_received_by_kind"].items():
            metrics.bytes("up", kind, total)
        for kind, total in status["bytes_sent_by_kind"].items():
            metrics.bytes("down", kind, total)
        for phase, total in status["engine_s"].items():
            metrics.engine_seconds(phase, total)
        for code, total in status["errors"].items():
            metrics.errors(code, total)
        if seconds is not None and before is not None:
            for _ in range(status["next_step"] - before.step):
                metrics.step_seconds(seconds)

    def _record(self, before: ServerSnapshot | None, snapshot: ServerSnapshot, seconds: float | None) -> None:
        if self._log is None:
            self._log = RunLog(self._folder, self._tensorboard)
            self._log.write("start", step=snapshot.step)
        earlier = () if before is None else before.connected
        for name in snapshot.connected:
            if name not in earlier:
                self._log.write("joined", step=snapshot.step, client=name)
        for name in earlier:
            if name not in snapshot.connected:
                self._log.write("left", step=snapshot.step, client=name)
        if seconds is not None:
            self._log.write(
                "progress",
                step=snapshot.step,
                round=snapshot.round,
                num_connected=len(snapshot.connected),
                num_tokens=snapshot.tokens,
                bytes_up=snapshot.bytes_up,
                bytes_down=snapshot.bytes_down,
                step_seconds=round(seconds, 6),
            )


def _inference(status: Mapping[str, Any] | None) -> InferenceSnapshot | None:
    if status is None:
        return None
    return InferenceSnapshot(**{field.name: status[field.name] for field in fields(InferenceSnapshot)})
