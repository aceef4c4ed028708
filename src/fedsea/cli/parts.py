"""How far the parts of a long command are."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_EVERY = 10
"""Steps between two lines about a part, where there is no terminal; more, if that would be many lines."""
_MOST_LINES = 10

_LEAST_BAR, _BESIDE_THE_BAR = 8, 80
"""Columns of the bar, and those that the longest description and the numbers take."""


class Parts:
    """How far each part is: bars on a terminal, else a line every few steps and one when a part is done.

    Args:
        silent: Show nothing.
        clock: Monotonic seconds.
    """

    def __init__(self, silent: bool, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        console = Console(stderr=True)
        self._lines = not silent and not console.is_terminal
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._clock = clock
        self._began: dict[str, tuple[float, int]] = {}
        self._told: dict[str, int] = {}
        # Where there is little room the bar is short and the description takes two lines; no number is cut.
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column()),
            BarColumn(bar_width=min(40, max(_LEAST_BAR, console.width - _BESIDE_THE_BAR))),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        )
        self._bars = Progress(*columns, console=console, disable=silent or not console.is_terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def done(self) -> None:
        """Nothing more will be reported; what the terminal gets next stands below the bars."""
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """A part has come so far."""
        from fedsea.observe.figures import LEAST_STEPS

        now = self._clock()
        began, first = self._began.setdefault(what, (now, done))
        if not first:  # up to the first step one waits for others, which says nothing of the steps' own pace
            self._began[what] = (began, first) = (now, done)
        gone = done - first
        left = (now - began) / gone * (total - done) if gone >= LEAST_STEPS and done < total else None
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, left="")
        self._bars.update(self._tasks[what], completed=done, left="" if left is None else _about(left))
        if self._lines:
            self._line(what, done, total, now - began if gone else None, left)

    def _line(self, what: str, done: int, total: int, took_s: float | None, left_s: float | None) -> None:
        told, every = self._told.get(what), max(_LINE_EVERY, total // _MOST_LINES)
        if told is None or done // every > told // every or told < done == total:
            self._told[what] = done
            said = [f"{what}: {done} of {total}", "done" if done == total else "under way"]
            said += [] if took_s is None else [f"{took_s:.0f} s"]
            said += [] if left_s is None else [_about(left_s)]
            self._console.print(", ".join(said), markup=False, highlight=False, soft_wrap=True)


def _about(left_s: float) -> str:
    from fedsea.observe.figures import duration_text

    return f"about {duration_text(left_s)} left"
