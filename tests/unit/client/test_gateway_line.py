"""The line before the gateway's threads: who has a place in it, and for how long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
from starlette.requests import ClientDisconnect

from fedsea.client.gateway.errors import Closing
from fedsea.client.gateway.metrics import GatewayMetrics
from fedsea.client.gateway.requests import Choice
from fedsea.client.gateway.work import Means, Work, Workers, _Running
from fedsea.client.generation import GenerationSettings
from fedsea.errors import CapacityError, FedseaError, SessionLost

DEADLINE_S = 30.0


class Gate:
    """A decoder that has no answer for anybody, and that not before the gate is open."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.open_for = threading.Semaphore(0)

    def open(self, length: int) -> NoReturn:
        self.arrived.release()
        assert self.open_for.acquire(timeout=DEADLINE_S)
        raise SessionLost(f"asked for {length}")


class Line:
    """One thread, and room for two that wait."""

    def __init__(self) -> None:
        self.gate, self.metrics = Gate(), GatewayMetrics()
        self.workers = Workers(Means(self.gate, None, None, self.metrics), most=1, most_waiting=2)

    def start(self, num_tokens: int, num_choices: int = 1) -> Work:
        settings = GenerationSettings(max_new_tokens=num_tokens)
        return self.workers.start([Choice(index, (1,), settings, ()) for index in range(num_choices)], False)

    def count(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"fedsea_gateway_{name}")


async def ended(work: Work) -> BaseException:
    """Why it ended."""
    with pytest.raises((FedseaError, ClientDisconnect)) as raised:
        await anext(work.events(DEADLINE_S))
    return raised.value


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, DEADLINE_S))


def test_who_is_cancelled_while_waiting_leaves_the_line_at_once() -> None:
    async def test() -> None:
        line = Line()
        with line.workers:
            runs = line.start(1)
            assert line.gate.arrived.acquire(timeout=DEADLINE_S)
            first, second = line.start(2), line.start(3)
            with pytest.raises(CapacityError):
                line.start(4)
            assert (line.count("running"), line.count("waiting")) == (1, 2)
            first.cancel()
            first.cancel()
            assert (line.count("running"), line.count("waiting"), line.count("cancelled_total")) == (1, 1, 1)
            assert isinstance(await ended(first), ClientDisconnect)
            third = line.start(4)
            line.gate.open_for.release(4)
            # The prompt has one token: each is run in its turn, and the one that was given up is not.
            assert [str(await ended(work)) for work in (runs, second, third)] == [f"asked for {n}" for n in (2, 4, 5)]
        assert (line.count("running"), line.count("waiting"), line.count("cancelled_total")) == (0, 0, 1)

    run(test())


def test_an_answer_that_fails_is_over_before_anybody_hears_of_it() -> None:
    line, told = Line(), []

    def deliver(event: object) -> None:
        told.append(event)
        one.cancel()  # who has asked goes away at once

    one = _Running(Choice(0, (1,), GenerationSettings(max_new_tokens=2), ()), False, deliver)
    line.gate.open_for.release()
    one.run(Means(line.gate, None, None, line.metrics))
    assert [str(event) for event in told] == ["asked for 3"]
    assert line.count("cancelled_total") == 0


def test_a_request_with_several_choices_leaves_with_all_of_them() -> None:
    async def test() -> None:
        line = Line()
        with line.workers:
            work = line.start(1, num_choices=3)
            assert line.gate.arrived.acquire(timeout=DEADLINE_S)
            work.cancel()
            assert line.count("waiting") == 0
            line.gate.open_for.release()
        assert line.count("cancelled_total") == 3

    run(test())


def test_a_request_that_is_taken_on_while_the_gateway_closes_hears_that_it_closes() -> None:
    async def test() -> None:
        line = Line()
        threads = line.workers._threads
        submit, shutdown, taking, settled = threads.submit, threads.shutdown, threading.Event(), threading.Event()

        class Lock:
            """Says when one has to wait for it."""

            def __init__(self) -> None:
                self._lock = threading.Lock()

            def __enter__(self) -> None:
                if not self._lock.acquire(blocking=False):
                    settled.set()
                    self._lock.acquire()

            def __exit__(self, *_: object) -> None:
                self._lock.release()

        def late(*args: Any) -> Any:
            taking.set()
            assert settled.wait(DEADLINE_S)
            return submit(*args)

        def shut(**how: bool) -> None:
            shutdown(wait=False)
            settled.set()
            shutdown(**how)

        def close() -> None:
            assert taking.wait(DEADLINE_S)
            line.workers.__exit__()

        line.workers._lock, threads.submit, threads.shutdown = Lock(), late, shut  # type: ignore[assignment,method-assign]
        with ThreadPoolExecutor(1) as closer:
            closed = closer.submit(close)
            try:
                assert isinstance(await ended(line.start(1)), Closing)
            finally:
                line.gate.open_for.release()
            closed.result(DEADLINE_S)
        with pytest.raises(Closing):
            line.start(1)

    run(test())
