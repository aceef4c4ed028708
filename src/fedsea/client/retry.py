"""How often, and for how long, a lost connection is sought again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field


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
