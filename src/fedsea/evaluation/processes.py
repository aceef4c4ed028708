"""Child processes of `fedsea` itself: started with a log file each, ended when their owner is done."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

from fedsea.errors import FedseaError

_LIBRARIES = ("fedsea.cli.main", "fedsea.client.run", "fedsea.server.run", "fedsea.client.gateway.run")
"""What the commands import; loading it takes a core several seconds. What is not installed is left out."""


def make_context() -> BaseContext:
    """How processes begin: on Linux as forks of one that has only loaded the libraries, elsewhere each from nothing."""
    if sys.platform != "linux":  # other systems' own libraries may not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    return context


class Processes:
    """Runs `fedsea` commands beside this process; leaving the context ends those that still run.

    Args:
        logs: Folder of the log files.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._context = make_context()
        self._running: dict[str, BaseProcess] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._running.values()):  # who started last relies on those before, and would miss them
            if process.is_alive():
                process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def load_libraries(self) -> None:
        """Let the libraries be loaded for all processes from now on, where that can be done; does not wait for it."""
        if self._context.get_start_method() == "forkserver":
            from multiprocessing import forkserver

            with apart():
                forkserver.ensure_running()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `fedsea ARGUMENTS` with one CPU thread; its output goes to `NAME.log`."""
        self.call(name, _command, *arguments)

    def call(self, name: str, function: Callable[..., object], *arguments: str) -> None:
        """Start a process that calls a module's function; its output goes to `NAME.log`, what it returns nowhere."""
        log = self._logs / f"{name}.log"
        log.touch()
        process = self._context.Process(target=_logged, args=(str(log), function, arguments), name=name)  # type: ignore[attr-defined]
        with apart():
            process.start()
        self._running[name] = process

    def check(self) -> None:
        """Raise if a process has failed.

        Raises:
            FedseaError: Names it, with the end of its log.
        """
        for name in list(self._running):
            if (code := self._exit_code(name)) not in (None, 0):
                lines = (self._logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it printed nothing"
                raise FedseaError(f"The process {name!r} ended with code {code}: {last}")

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
        while any(self.alive(name) for name in names):
            self.check()
            if time.monotonic() > deadline:
                raise FedseaError(f"The run was not over after {timeout_s:g} s; see the logs in {self._logs}.")
            time.sleep(0.05)
        self.check()

    def last_line(self, name: str, timeout_s: float) -> str:
        """The last line that a process has printed when it has ended well.

        Raises:
            FedseaError: As `wait`.
        """
        self.wait((name,), timeout_s)
        return (self._logs / f"{name}.log").read_text().strip().splitlines()[-1]

    def alive(self, name: str) -> bool:
        """Whether a process still runs."""
        return self._exit_code(name) is None

    def ended(self, name: str) -> bool:
        """Whether a process was started and has ended, well or not."""
        return name in self._running and not self.alive(name)

    def _exit_code(self, name: str) -> int | None:
        with self._lock:  # of two threads that ask at once, one would be told a wrong one
            return self._running[name].exitcode


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What is started inside has nothing of this process.

    It computes with one thread, since more processes than cores would wait for each other's; and it does not run this
    process's main module again, as Python's new processes otherwise do, guarded or not.
    """
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, own = {name: os.environ.get(name) for name in settings}, sys.modules["__main__"]
    os.environ |= settings
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _logged(log: str, function: Callable[..., object], arguments: Sequence[str]) -> None:
    """In the new process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)


def _command(*arguments: str) -> None:
    """What `python -m fedsea` does."""
    sys.argv = ["fedsea", *arguments]
    runpy.run_module("fedsea", run_name="__main__")
