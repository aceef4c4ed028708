"""Progress in the terminal: a live display; on anything else a plain line every few seconds; or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedsea.observe.figures import Pace, WorkingTime, bytes_text, counted, duration_text, number_text
from fedsea.observe.observers import EvaluationLike, Link, StepLike
from fedsea.observe.snapshots import ServerSnapshot
from fedsea.observe.terminal import takes_seconds
from fedsea.plan import FederationPlan

_EVERY_S = 5.0
_SEPARATOR = " · "


class _Screen:
    """Shows what `render` gives: redrawn on a terminal, or `line` now and then, or nothing."""

    def __init__(self, quiet: bool, console: Console | None, clock: Callable[[], float], every_s: float) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._every_s = every_s
        self._quiet = quiet
        self._last_line = -float("inf")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> RenderableType:
        raise NotImplementedError

    def line(self) -> str:
        raise NotImplementedError

    def _plain(self, text: str) -> None:
        if not self._quiet and self._live is None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _changed(self, *, now: bool = False) -> None:
        """Say how things stand, if the last time is long enough ago (or `now`)."""
        if now or self._clock() - self._last_line >= self._every_s:
            self._last_line = self._clock()
            self._plain(self.line())

    def _say(self, text: str) -> None:
        """One line that stays on the screen."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            self._plain(text)


class ClientDisplay(_Screen):
    """A client's training run; satisfies the trainer's `Observer`.

    Args:
        plan: The plan, if it is known already; else it comes with `begin`.
        name: The client's name; likewise.
        quiet: Show nothing at all.
        console: Where to; stderr by default, so that stdout keeps results only.
        clock: Monotonic seconds.
        every_s: Seconds between plain lines.
    """

    def __init__(
        self,
        plan: FederationPlan | None = None,
        name: str = "",
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = _EVERY_S,
    ) -> None:
        super().__init__(quiet, console, clock, every_s)
        self._name = name
        self._num_steps = plan.num_steps if plan else 0
        self._link: Link | None = None
        self._done = 0  # steps of the run
        self._here = 0  # thereof by this process
        self._round = 0
        self._loss: float | None = None
        self._held_out: EvaluationLike | None = None
        self._waiting: tuple[str, ...] = ()
        self._spinner: Spinner | None = None  # as long as something is being loaded
        self._bytes = (0, 0)
        self._working = WorkingTime(clock)
        self._pace = Pace()
        self._tokens = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.transient = self._spinner is not None  # it stays on the screen only if there was a run
        super().__exit__(kind, error, trace)

    def loading(self, what: str) -> None:
        """This is being done, and there is nothing to be trained yet; elsewhere than on a terminal only the first."""
        if self._spinner is None:
            self._spinner = Spinner("dots")
            self._plain(takes_seconds(what))
        self._spinner.update(text=Text(f"{what} …"))
        if self._live is not None:
            self._live.refresh()  # at once: an import may leave no other thread its turn

    def begin(self, plan: FederationPlan, name: str, link: Link | None = None) -> None:
        """The plan is agreed on; bytes are read from `link` from now on."""
        self._spinner = None
        self._name, self._num_steps, self._link = name, plan.num_steps, link
        self._pace.mark(self._working(), 0, 0)

    def step(self, report: StepLike) -> None:
        """A step was applied."""
        first = self._loss is None
        self._done, self._num_steps = report.step + 1, report.num_steps
        self._round, self._loss, self._waiting = report.round, report.mean_loss, ()
        self._tokens += report.num_tokens
        self._here += 1
        self._working.wait(False)
        self._pace.mark(self._working(), self._here, self._tokens)
        self._changed(now=first or self._done == self._num_steps)

    def evaluation(self, report: EvaluationLike) -> None:
        """The held-out split was evaluated."""
        self._held_out = report
        self._say(f"{self._prefix()}held-out loss {report.mean_loss:.4f} after {report.next_step} steps")

    def waiting(self, names: Sequence[str]) -> None:
        """The server waits for these clients; none: it goes on."""
        names = tuple(names)
        if names and names != self._waiting:
            self._plain(f"{self._prefix()}waiting for {', '.join(names)}")
        self._waiting = names
        self._working.wait(bool(names))

    def bytes(self, up: int, down: int) -> None:
        """Bytes sent and received so far."""
        self._bytes = (up, down)

    def line(self) -> str:
        """How the run stands, in one line."""
        return self._prefix() + _SEPARATOR.join([f"step {self._done}/{self._num_steps}", *self._facts()])

    def render(self) -> RenderableType:
        """How the run stands, for the live display."""
        if (spinner := self._spinner) is not None:
            return spinner
        rows: list[RenderableType] = [
            _bar(self._name, self._done, self._num_steps),
            _facts_text(self._facts(), self._console.width),
        ]
        if self._waiting:
            rows.append(Text(f"waiting for {', '.join(self._waiting)}", style="yellow"))
        return Group(*rows)

    def _prefix(self) -> str:
        return f"{self._name}: " if self._name else ""

    def _facts(self) -> list[str]:
        if self._loss is None:
            return ["waiting for the first step"]
        facts = [f"round {self._round + 1}", f"loss {self._loss:.4f}"]
        if (held := self._held_out) is not None:
            when = f"at step {held.next_step}" if held.next_step else "before training"
            facts.append(f"held-out {held.mean_loss:.4f} {when}")
        facts += _speed(self._pace)
        up, down = self._link.num_bytes if self._link is not None else self._bytes
        if up or down:
            facts.append(f"up {bytes_text(up)}, down {bytes_text(down)}")
        return facts + _left(self._pace, self._num_steps - self._done)


class ServerDisplay(_Screen):
    """A server's run.

    Args:
        plan: The plan, for the number of steps and the clients' names.
        quiet: Show nothing at all.
        console: Where to; stderr by default.
        clock: Monotonic seconds.
        every_s: Seconds between plain lines.
    """

    def __init__(
        self,
        plan: FederationPlan,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = _EVERY_S,
    ) -> None:
        super().__init__(quiet, console, clock, every_s)
        self._plan = plan
        self._snapshot: ServerSnapshot | None = None
        self._working = WorkingTime(clock)
        self._pace = Pace()
        self._decoding = Pace()

    def update(self, snapshot: ServerSnapshot) -> None:
        """Show how the server stands; called as often as one likes."""
        before, self._snapshot = self._snapshot, snapshot
        if before is None or snapshot.step != before.step:
            self._working.wait(False)
            self._pace.mark(self._working(), snapshot.step, snapshot.tokens)
        self._working.wait(bool(_missing(snapshot)))
        if snapshot.inference is not None:
            self._decoding.mark(self._clock(), 0, snapshot.inference.tokens)
        people = before is None or (snapshot.connected, snapshot.refused) != (before.connected, before.refused)
        ended = before is not None and before.step != snapshot.step == snapshot.num_steps
        if before is None or snapshot != before:
            self._changed(now=people or ended)

    def line(self) -> str:
        """How the server stands, in one line."""
        snapshot = self._snapshot
        if snapshot is None:
            return "starting"
        facts = [f"step {snapshot.step}/{snapshot.num_steps}", f"round {self._round(snapshot)}"]
        facts.append(f"{len(snapshot.connected)}/{len(self._plan.clients)} clients")
        if missing := [name + _why(name, snapshot) for name in _missing(snapshot)]:
            facts.append(f"waiting for {', '.join(missing)}")
        return _SEPARATOR.join([*facts, *self._figures(snapshot), *self._sessions(snapshot)])

    def render(self) -> RenderableType:
        """How the server stands, for the live display."""
        snapshot = self._snapshot
        if snapshot is None:
            return Text("starting")
        facts = [f"round {self._round(snapshot)}", *self._figures(snapshot)]
        rows: list[RenderableType] = [
            _bar(self._plan.name, snapshot.step, snapshot.num_steps),
            _facts_text(facts, self._console.width),
        ]
        if sessions := self._sessions(snapshot):
            rows.append(_facts_text(sessions, self._console.width))
        table = Table("client", "state", box=None, padding=(0, 2, 0, 0))
        for name in self._plan.client_names:
            table.add_row(name, _state(name, snapshot))
        return Group(*rows, table)

    def _round(self, snapshot: ServerSnapshot) -> str:
        total = self._plan.training.rounds
        return f"{min(snapshot.round + 1, total)}/{total}"

    def _figures(self, snapshot: ServerSnapshot) -> list[str]:
        traffic = f"up {bytes_text(snapshot.bytes_up)}, down {bytes_text(snapshot.bytes_down)}"
        return [*_speed(self._pace, "target tokens"), traffic, *_left(self._pace, snapshot.num_steps - snapshot.step)]

    def _sessions(self, snapshot: ServerSnapshot) -> list[str]:
        """Decoding, as long as anybody does."""
        now = snapshot.inference
        if now is None or not now.sessions:
            return []
        memory = f"KV {bytes_text(now.kv_bytes)} of {bytes_text(now.kv_bytes_limit)}"
        people = f"{counted(now.sessions, 'session')}, {counted(now.sequences, 'sequence')}"
        return [f"inference: {people}", memory, *_speed(self._decoding)]


def _missing(snapshot: ServerSnapshot) -> list[str]:
    """Who is waited for and not there; whoever is there works, which takes its time."""
    return [name for name in snapshot.waiting_for if name not in snapshot.connected]


def _why(name: str, snapshot: ServerSnapshot) -> str:
    """Why the server does not let a client in, behind its name or state."""
    return f" ({snapshot.refused[name]})" if name in snapshot.refused else ""


def _state(name: str, snapshot: ServerSnapshot) -> Text:
    if name in snapshot.using and name not in (*snapshot.connected, *snapshot.waiting_for):
        return Text("uses the model", style="green")
    if name not in snapshot.connected:
        urgent = name in snapshot.waiting_for or name in snapshot.refused
        return Text("not connected" + _why(name, snapshot), style="red" if urgent else "dim")
    if name in snapshot.waiting_for:
        return Text("working", style="yellow")
    return Text("connected", style="green")


def _bar(title: str, done: int, total: int) -> RenderableType:
    """Where there is little room the bar is short and the title cut, never a number."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(overflow="ellipsis")
    grid.add_column()
    grid.add_column(no_wrap=True)
    grid.add_row(Text(title, style="bold", no_wrap=True), ProgressBar(max(total, 1), done, width=40), f"{done}/{total}")
    return grid


def _facts_text(facts: Sequence[str], width: int) -> Text:
    """Facts side by side, as many in a line as there is room for."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(_SEPARATOR) + len(fact) <= width:
            lines[-1] += _SEPARATOR + fact
        else:
            lines.append(fact)
    return Text("\n".join(lines))


def _speed(pace: Pace, what: str = "tokens") -> list[str]:
    rate = pace.tokens_per_s
    return [] if rate is None else [f"{number_text(rate)} {what}/s"]


def _left(pace: Pace, steps: int) -> list[str]:
    seconds = pace.seconds_left(steps) if steps > 0 else None
    return [] if seconds is None else [f"{duration_text(seconds)} left"]
