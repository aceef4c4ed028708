"""What a command says while there is nothing else to be seen of it yet."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.live import Live

LIBRARIES = "loading the libraries"
"""What every command that computes does first; said before it is done."""


class Loading:
    """Says on stderr what is being done: beside a spinner on a terminal, else the first of it in one line.

    Args:
        silent: Show nothing.
    """

    def __init__(self, silent: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._silent = silent
        self._told = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def __call__(self, what: str) -> None:
        """This is being done from now on."""
        if self._silent:
            return
        if not self._console.is_terminal:
            self._line(what)
            return
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots", Text(f"{what} …"))
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=10, transient=True)
            self._live.start()
        self._live.update(spinner, refresh=True)  # at once: an import may leave no other thread its turn

    def done(self) -> None:
        """Nothing more of this is to be shown."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, what: str) -> None:
        if not self._told:
            self._told = True
            from fedsea.observe.terminal import takes_seconds

            self._console.print(takes_seconds(what), markup=False, highlight=False, soft_wrap=True)
