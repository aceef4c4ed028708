"""SIGKILL at a chosen call of the system, in a process made for it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Killer:
    """Ends this process at the nth call of what durable state asks the system for.

    Args:
        at: Which call.
        when: "before" it, "after" it, or in the "middle" of a write.
    """

    def __init__(self, at: int, when: str) -> None:
        self.left, self.when = at, when

    def install(self) -> None:
        """Watch this process from now on."""
        calls = [(os, name) for name in ("write", "pwrite", "fsync", "open", "replace", "ftruncate")]
        for module, name in (*calls, (fcntl, "flock")):
            setattr(module, name, self._around(getattr(module, name), name))

    def _around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left:
                return call(*args, **kwargs)
            if self.when == "after":
                call(*args, **kwargs)
            elif self.when == "middle" and name in ("write", "pwrite"):
                call(args[0], args[1][: len(args[1]) * 2 // 3], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("still alive")

        return watched


def in_a_process(work: Callable[[], object]) -> bool:
    """Do it in a process of its own; whether that was killed."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


class Nursery:
    """`in_a_process` from a process that has imported little: a fork copies what the forking process holds.

    Use as a context manager. What is called is pickled, so that its function is that of a module.
    """

    def __enter__(self) -> Nursery:
        context = multiprocessing.get_context("spawn")
        self._asks, asked = context.Pipe()
        self._process = context.Process(target=_nurse, args=(asked,), daemon=True)
        self._process.start()
        asked.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._asks.close()
        self._process.join(10.0)

    def __call__(self, work: Callable[[], object]) -> bool:
        """Do it in a process of its own; whether that was killed."""
        self._asks.send(work)
        killed: bool = self._asks.recv()
        return killed


def _nurse(asked: Connection) -> None:
    while True:
        try:
            work = asked.recv()
        except EOFError:
            return
        asked.send(in_a_process(work))
