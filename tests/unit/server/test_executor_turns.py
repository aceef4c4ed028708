"""Decoding goes before other work, and nothing waits for ever: neither training nor an evaluation."""

from __future__ import annotations

import pytest

from fedsea.server.executor import local
from fedsea.server.executor.local import Priority

TURN_S = local._TURN_S


class Queue:
    """The engine's jobs without a thread: `next` says what would run, which then takes some seconds."""

    def __init__(self) -> None:
        self._jobs = local._Jobs()
        self._ran: list[str] = []

    def put(self, priority: Priority, name: str = "") -> None:
        self._jobs.put(priority, lambda: self._ran.append(name or priority.name))

    def next(self, seconds: float = 0.001) -> str:
        taken = self._jobs.take()
        assert taken is not None
        priority, _, run = taken
        run()
        self._jobs.ran(priority, seconds)
        return self._ran[-1]


def test_decoding_goes_before_training_and_evaluation():
    queue = Queue()
    for priority in (Priority.EVALUATE, Priority.FORWARD, Priority.BACKWARD, Priority.DECODE):
        queue.put(priority)
    assert [queue.next() for _ in range(4)] == ["DECODE", "BACKWARD", "FORWARD", "EVALUATE"]


def test_control_goes_before_everything():
    queue = Queue()
    for priority in (Priority.DECODE, Priority.CONTROL, Priority.DECODE):
        queue.put(priority)
    assert [queue.next() for _ in range(3)] == ["CONTROL", "DECODE", "DECODE"]


@pytest.mark.parametrize("kept_waiting", [Priority.FORWARD, Priority.BACKWARD, Priority.EVALUATE])
def test_endless_decoding_lets_another_job_through_after_its_turn(kept_waiting):
    queue = Queue()
    queue.put(kept_waiting)
    waited_s = 0.0
    while True:
        queue.put(Priority.DECODE)
        if queue.next(seconds=TURN_S / 8) != "DECODE":
            break
        waited_s += TURN_S / 8
        assert waited_s < 2 * TURN_S
    assert waited_s == pytest.approx(TURN_S)


def test_decoding_has_its_next_turn_after_one_job():
    queue = Queue()
    for _ in range(3):
        queue.put(Priority.FORWARD)
    order = []
    for _ in range(6):
        queue.put(Priority.DECODE)
        order.append(queue.next(seconds=TURN_S))
    assert order == ["DECODE", "FORWARD"] * 3


def test_time_in_which_nobody_else_waited_does_not_count():
    queue = Queue()
    for _ in range(10):
        queue.put(Priority.DECODE)
        assert queue.next(seconds=TURN_S) == "DECODE"
    queue.put(Priority.FORWARD)
    queue.put(Priority.DECODE)
    assert queue.next() == "DECODE"


def test_evaluation_is_not_overtaken_for_ever():
    queue = Queue()
    queue.put(Priority.EVALUATE)
    overtaken = 0
    while True:
        queue.put(Priority.FORWARD)
        queue.put(Priority.BACKWARD)
        if queue.next() == "EVALUATE":
            break
        overtaken += 1
        assert overtaken <= local._MOST_OVERTAKEN
    assert overtaken == local._MOST_OVERTAKEN


def test_evaluation_is_not_starved_by_training_and_decoding_together():
    queue = Queue()
    queue.put(Priority.EVALUATE)
    order = []
    while "EVALUATE" not in order:
        queue.put(Priority.FORWARD)
        queue.put(Priority.DECODE)
        order.append(queue.next(seconds=TURN_S))
        assert len(order) < 4 * local._MOST_OVERTAKEN
    assert order.count("FORWARD") == local._MOST_OVERTAKEN


def test_steps_control_goes_before_an_overdue_evaluation():
    queue = Queue()
    queue.put(Priority.EVALUATE)
    for _ in range(local._MOST_OVERTAKEN):
        queue.put(Priority.FORWARD)
        queue.next()
    queue.put(Priority.CONTROL)
    queue.put(Priority.FORWARD)
    assert [queue.next() for _ in range(3)] == ["CONTROL", "EVALUATE", "FORWARD"]
