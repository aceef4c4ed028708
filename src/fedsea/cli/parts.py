"""How far the parts of a long command are."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_EVERY = 10
"""Steps between two lines about a part, where there is no terminal; more, if that would be many lines."""
_MOST_LINES = 10


class Parts:
    """How far each part is: bars on a terminal, else a line every few steps and one when a part is done."""

    def __init__(self, silent: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._lines = not silent and not console.is_terminal
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)
        if self._lines:
            self._line(what, done, total)

    def _line(self, what: str, done: int, total: int) -> None:
        told, every = self._told.get(what), max(_LINE_EVERY, total // _MOST_LINES)
        if told is None or done // every > told // every or told < done == total:
            self._told[what] = done
            state = "done" if done == total else "under way"
            self._console.print(f"{what}: {done} of {total}, {state}", markup=False, highlight=False, soft_wrap=True)
