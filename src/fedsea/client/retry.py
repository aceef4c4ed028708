"""How often, and for how long, a lost connection is sought again, and how often that is said."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedsea.errors import FedseaError
from fedsea.observe.figures import duration_text

log = logging.getLogger(__name__)

_SAY_AGAIN_S, _SAY_SELDOM_S = 30.0, 600.0
"""The same reason is said again after so long, then after twice as long each time, up to the second."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter, bounded in time.

    Attributes:
        retry_for_s: Give up after this many seconds without a connection.
        first_s: First pause; each later one is twice as long.
        longest_s: No pause is longer.
    """

    retry_for_s: float = 600.0
    first_s: float = 0.2
    longest_s: float = 10.0
    random: random.Random = field(default_factory=random.Random, repr=False)

    def pauses(self) -> Iterator[float]:
        """Pauses in seconds, each between half and all of its nominal length; ends when the time is used up."""
        nominal, spent = self.first_s, 0.0
        while spent < self.retry_for_s:
            pause = min(nominal * (0.5 + self.random.random() / 2), self.retry_for_s - spent)
            spent += pause
            yield pause
            nominal = min(2 * nominal, self.longest_s)

    def tries(self, clock: Callable[[], float] = time.monotonic) -> Tries:
        """For one outage."""
        return Tries(self, clock)


class Tries:
    """The tries to end one outage; made by `RetryPolicy.tries`.

    Args:
        policy: How often, and for how long.
        clock: Monotonic seconds.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._pauses = policy.pauses()
        self._left_s = policy.retry_for_s
        self._clock = clock
        self._reason = ""
        self._say_at = self._say_after_s = 0.0

    def pause_after(self, error: FedseaError) -> float | None:
        """Seconds until the next try; None if there is to be none. Says so, but the same not every time."""
        pause = next(self._pauses, None)
        if pause is None or not error.retryable:
            return None
        self._say(error.message)
        self._left_s -= pause
        return pause

    def _say(self, reason: str) -> None:
        now = self._clock()
        if reason == self._reason and now < self._say_at:
            return
        self._say_after_s = _SAY_AGAIN_S if reason != self._reason else min(2 * self._say_after_s, _SAY_SELDOM_S)
        self._reason, self._say_at = reason, now + self._say_after_s
        how_long = "" if math.isinf(self._left_s) else f", for {duration_text(self._left_s)} at most"
        log.warning("%s Trying again%s.", reason, how_long)
