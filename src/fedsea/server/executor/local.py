"""The engine thread: one worker, jobs in order of priority, results delivered on the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any

_TURN_S = 0.25
"""So long decoding may keep other work waiting before one job of that is run."""
_MOST_OVERTAKEN = 16
"""Jobs, decoding not counted, that may run before one which came earlier."""


class Priority(IntEnum):
    """Lower runs first: somebody waits for every token; a backward pass frees memory and lets a client go on."""

    CONTROL = 0
    DECODE = 1
    BACKWARD = 2
    FORWARD = 3
    EVALUATE = 4


Job = tuple[int, int, Callable[[], None]]
"""Priority, how many other jobs had been taken when it came, and what to run."""


class _Jobs:
    """Waiting jobs: the most urgent first, and within bounds, so that none waits for ever.

    Decoding lets one other job through now and then; an evaluation, which everything else may overtake, comes to its
    turn after `_MOST_OVERTAKEN` of them.
    """

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._decoding: deque[Job] = deque()
        self._others: dict[int, deque[Job]] = {one: deque() for one in Priority if one is not Priority.DECODE}
        self._taken = 0
        self._kept_waiting_s = 0.0
        self._closed = False

    def put(self, priority: Priority, run: Callable[[], None]) -> None:
        with self._news:
            queue = self._decoding if priority is Priority.DECODE else self._others[priority]
            queue.append((priority, self._taken, run))
            self._news.notify()

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify()

    def take(self) -> Job | None:
        """The next job; None when closed."""
        with self._news:
            self._news.wait_for(lambda: self._closed or self._decoding or any(self._others.values()))
            if self._closed:
                return None
            other = self._next_other()
            decode = bool(self._decoding)
            if decode and other is not None:
                decode = other[0][0] > Priority.DECODE and self._kept_waiting_s < _TURN_S
            if decode or other is None:
                return self._decoding.popleft()
            self._taken += 1
            return other.popleft()

    def _next_other(self) -> deque[Job] | None:
        """The queue whose first job is next, decoding left out of account."""
        queues = [queue for queue in self._others.values() if queue]
        if not queues:
            return None
        oldest = min(reversed(queues), key=lambda queue: queue[0][1])
        overdue = self._taken - oldest[0][1] >= _MOST_OVERTAKEN
        return oldest if overdue and queues[0][0][0] != Priority.CONTROL else queues[0]

    def ran(self, priority: int, seconds: float) -> None:
        """Note how long a job took."""
        with self._news:
            if priority != Priority.DECODE or not any(self._others.values()):
                self._kept_waiting_s = 0.0
            else:
                self._kept_waiting_s += seconds


class EngineThread:
    """Runs jobs one at a time away from the event loop.

    Use as a context manager; leaving it waits for the job that is running and drops the rest.

    Attributes:
        busy_s: Priority's name in lower case to seconds that its jobs have run.
        cpu_s: Likewise, CPU seconds of the engine thread.
    """

    def __init__(self) -> None:
        self.busy_s: defaultdict[str, float] = defaultdict(float)
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self._jobs = _Jobs()
        self._thread = threading.Thread(target=self._work, name="fedsea-engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.close()
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
            try:
                result, error = job(), None
            except BaseException as caught:  # noqa: BLE001 (delivered to whoever waits for the job)
                result, error = None, caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, result, error)

        self._jobs.put(priority, run)
        return future

    def _work(self) -> None:
        while (taken := self._jobs.take()) is not None:
            priority, _, run = taken
            began, began_cpu = time.perf_counter(), time.thread_time()
            run()
            seconds = time.perf_counter() - began
            self._jobs.ran(priority, seconds)
            name = Priority(priority).name.lower()
            self.busy_s[name] += seconds
            self.cpu_s[name] += time.thread_time() - began_cpu
