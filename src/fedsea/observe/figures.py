"""How bytes, durations and rates are written, and how a rate is taken from a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_WINDOW = 30
LEAST_STEPS = 2
"""No time left is told before so many steps are done behind the first one, which warms up."""
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def bytes_text(count: float) -> str:
    """Decimal units, three digits: `1.23 MB`.

    >>> bytes_text(999), bytes_text(67_100_000), bytes_text(12_345)
    ('999 B', '67.1 MB', '12.3 KB')
    """
    unit = 0
    while count >= 999.5 and unit < 5:
        count, unit = count / 1000, unit + 1
    if unit == 0:
        return f"{count:.0f} B"
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {'BKMGTP'[unit]}B"


def duration_text(seconds: float) -> str:
    """The two largest units.

    >>> duration_text(7.4), duration_text(75), duration_text(7265), duration_text(200_000)
    ('7 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"
    return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"


def number_text(value: float) -> str:
    """Thousands apart; one digit behind the point below 10: `1,234`."""
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def counted(count: int, noun: str) -> str:
    """With an s where there is not exactly one: `1 session`, `2,000 sessions`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class WorkingTime:
    """Seconds that do not go on while somebody is waited for, so that a pace is the work's own.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waited = 0.0
        self._since: float | None = None

    def wait(self, waiting: bool) -> None:
        """From now on somebody is waited for, or nobody any more."""
        now = self._clock()
        if self._since is not None:
            self._waited += now - self._since
        self._since = now if waiting else None

    def __call__(self) -> float:
        """Seconds, monotonic."""
        return (self._clock() if self._since is None else self._since) - self._waited


class Pace:
    """Steps and tokens per second over the last steps of this process.

    Args:
        window: Steps over which the rate is taken.
    """

    def __init__(self, window: int = _WINDOW) -> None:
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._warm: deque[tuple[float, int, float]] = deque(maxlen=window)

    def mark(self, now: float, steps: int, tokens: float) -> None:
        """Note totals: `steps` done and `tokens` seen at the time `now` (monotonic seconds)."""
        if self._marks:
            self._warm.append((now, steps, tokens))
        self._marks.append((now, steps, tokens))

    @property
    def tokens_per_s(self) -> float | None:
        """None until there are two marks apart."""
        return self._rate(self._marks, 2)

    def seconds_left(self, steps: int) -> float | None:
        """Time for so many more steps; None until a few are done. What lies before the second mark does not count."""
        if not self._warm or self._warm[-1][1] - self._warm[0][1] < LEAST_STEPS:
            return None
        rate = self._rate(self._warm, 1)
        return None if not rate else steps / rate

    @staticmethod
    def _rate(marks: deque[tuple[float, int, float]], index: int) -> float | None:
        if len(marks) < 2:
            return None
        first, last = marks[0], marks[-1]
        return (last[index] - first[index]) / (last[0] - first[0]) if last[0] > first[0] else None
