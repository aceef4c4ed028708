"""The engine thread: one worker, jobs in order of priority, results delivered on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Priority(IntEnum):
    """Lower runs first: a waiting backward pass frees memory and lets a client go on."""

    CONTROL = 0
    BACKWARD = 1
    FORWARD = 2
    EVALUATE = 3


class EngineThread:
    """Runs jobs one at a time away from the event loop.

    Use as a context manager; leaving it waits for the job that is running and drops the rest.

    Attributes:
        busy_s: Priority's name in lower case to seconds that its jobs have run.
    """

    def __init__(self) -> None:
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, name="fedsea-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put((-1, next(self._order), None))
        self._thread.join()

    def submit(self, priority: Priority, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """Queue a job; call from the event loop.

        Returns:
            A future of the job's result or exception, set on the event loop.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def deliver(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            began = time.perf_counter()
            try:
                result, error = job(), None
            except BaseException as caught:  # noqa: BLE001 (delivered to whoever waits for the job)
                result, error = None, caught
            self.busy_s[priority.name.lower()] += time.perf_counter() - began
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, result, error)

        self._jobs.put((priority, next(self._order), run))
        return future

    def _work(self) -> None:
        while True:
            _, _, run = self._jobs.get()
            if run is None:
                return
            run()
