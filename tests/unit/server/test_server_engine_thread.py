"""Jobs of the engine run one at a time, the urgent ones first, and their results come back to the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fedsea.server.executor.local import EngineThread, Priority

DEADLINE_S = 10.0


def test_jobs_run_in_the_order_of_their_priority_then_of_their_coming():
    ran: list[str] = []
    begin = threading.Event()

    async def work() -> None:
        with EngineThread() as engine:
            first = engine.submit(Priority.CONTROL, lambda: begin.wait(DEADLINE_S))
            waiting = [
                engine.submit(priority, lambda name=name: ran.append(name))
                for priority, name in (
                    (Priority.EVALUATE, "evaluate"),
                    (Priority.FORWARD, "forward 1"),
                    (Priority.FORWARD, "forward 2"),
                    (Priority.BACKWARD, "backward"),
                    (Priority.CONTROL, "control"),
                )
            ]
            begin.set()
            await asyncio.wait_for(asyncio.gather(first, *waiting), DEADLINE_S)

    asyncio.run(work())
    assert ran == ["control", "backward", "forward 1", "forward 2", "evaluate"]


def test_jobs_run_on_one_thread_that_is_not_the_event_loops():
    async def work() -> set[int]:
        with EngineThread() as engine:
            jobs = [engine.submit(Priority.FORWARD, threading.get_ident) for _ in range(3)]
            return set(await asyncio.wait_for(asyncio.gather(*jobs), DEADLINE_S))

    threads = asyncio.run(work())
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_an_exception_reaches_who_waits_and_the_thread_goes_on():
    def fail() -> None:
        raise ValueError("of the job")

    async def work() -> int:
        with EngineThread() as engine:
            with pytest.raises(ValueError, match="of the job"):
                await asyncio.wait_for(engine.submit(Priority.FORWARD, fail), DEADLINE_S)
            return await asyncio.wait_for(engine.submit(Priority.FORWARD, lambda: 7), DEADLINE_S)

    assert asyncio.run(work()) == 7


def test_leaving_waits_for_the_running_job_and_drops_the_rest():
    started, release, ran = threading.Event(), threading.Event(), []

    def slow() -> None:
        started.set()
        assert release.wait(DEADLINE_S)
        ran.append("slow")

    async def work() -> None:
        with EngineThread() as engine:
            engine.submit(Priority.FORWARD, slow)
            engine.submit(Priority.FORWARD, lambda: ran.append("dropped"))
            await asyncio.to_thread(started.wait, DEADLINE_S)
            release.set()

    asyncio.run(work())
    assert ran == ["slow"]


def test_a_result_nobody_waits_for_any_more_is_dropped():
    started, release = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert release.wait(DEADLINE_S)

    async def work() -> int:
        with EngineThread() as engine:
            future = engine.submit(Priority.FORWARD, slow)
            await asyncio.to_thread(started.wait, DEADLINE_S)
            future.cancel()
            release.set()
            return await asyncio.wait_for(engine.submit(Priority.FORWARD, lambda: 3), DEADLINE_S)

    assert asyncio.run(work()) == 3
