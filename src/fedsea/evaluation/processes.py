"""Child processes of `fedsea` itself: started with a log file each, ended when their owner is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedsea.errors import FedseaError


class Processes:
    """Runs `fedsea` commands beside this process; leaving the context ends those that still run.

    Args:
        logs: Folder of the log files.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._running.values()):  # who started last relies on those before, and would miss them
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `fedsea ARGUMENTS` with one CPU thread; its output goes to `NAME.log`."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (self._logs / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedsea", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def check(self) -> None:
        """Raise if a process has failed.

        Raises:
            FedseaError: Names it, with the end of its log.
        """
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                lines = (self._logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it printed nothing"
                raise FedseaError(f"The process {name!r} ended with code {process.returncode}: {last}")

    def wait_for(self, path: Path, timeout_s: float) -> str:
        """Wait until a file is there.

        Returns:
            Its content.

        Raises:
            FedseaError: A process failed, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            self.check()
            if time.monotonic() > deadline:
                raise FedseaError(f"{path.name} was not there after {timeout_s:g} s; see the logs in {self._logs}.")
            time.sleep(0.05)
        return path.read_text()

    def wait(self, names: Sequence[str], timeout_s: float) -> None:
        """Wait until these processes have ended well.

        Raises:
            FedseaError: One failed, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while any(self._running[name].poll() is None for name in names):
            self.check()
            if time.monotonic() > deadline:
                raise FedseaError(f"The run was not over after {timeout_s:g} s; see the logs in {self._logs}.")
            time.sleep(0.05)
        self.check()

    def alive(self, name: str) -> bool:
        """Whether a process still runs."""
        return self._running[name].poll() is None
