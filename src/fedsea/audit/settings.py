"""How large an audit is, and how long it may take."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsea.audit.catalogue import IDS
from fedsea.audit.targets import OutOfTime, Progress
from fedsea.errors import ConfigError

Show = Callable[[str, int, int], None]
"""Told (what, done, of how many)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is attacked.

    Attributes:
        canaries: Notes with planted identifiers.
        texts: Most sequences of the user's own.
        tokens: Longest sequence.
        epochs: Passes over each, for averaging.
        beam: Hypotheses of a search.
        known: Texts that the attacker knows, for alignment.
        public: Texts that the public model writes, to train an inverter on.
        rhos: Noise of the curve, as mean noise norm over mean norm of the hidden states.
        curve_sequences: Sequences at each point of a curve; 0: no curves.
        curve_tokens: Their length.
        minutes: Time budget of the audit's own check, attacks and curves.
        sessions: Prompts that are asked, to see what leaves in use.
    """

    canaries: int
    texts: int
    tokens: int
    epochs: int
    beam: int
    known: int
    public: int
    rhos: tuple[float, ...]
    curve_sequences: int
    curve_tokens: int
    minutes: float
    sessions: int = 4


QUICK = Scale(8, 8, 56, 4, 4, 12, 96, (0.0, 0.5, 1.0, 2.0, 4.0), 4, 32, 2.5)
_MOST_MINUTES = 100_000
FULL = Scale(24, 48, 96, 16, 8, 32, 512, (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0), 12, 64, 30.0, 12)


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What an audit may be asked for.

    Attributes:
        path: Plan file, or a client's run folder.
        model: This machine's copy of the base model.
        client: Client of a plan file; its first one if empty.
        texts: Own files; they never leave the machine.
        quick: A few minutes on two cores for a small model.
        minutes: Time budget of the audit's own check, attacks and curves; None takes the scale's.
        attacks: Ids of those to run; empty runs all.
        seed: Of canaries, noise and attacks.
        device: Where models and attacks run.
        settings: A client's own settings file, whose noise may be stricter than the plan's.
    """

    path: Path
    model: str | None = None
    client: str = ""
    texts: tuple[Path, ...] = ()
    quick: bool = False
    minutes: float | None = None
    attacks: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    settings: Path | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.attacks) - set(IDS)):
            known = ", ".join(sorted(IDS, key=lambda one: int(one[1:])))
            raise ConfigError(f"There is no attack {', '.join(unknown)}: choose from {known}.")
        if self.minutes is not None and not 0 < self.minutes < _MOST_MINUTES:
            raise ConfigError(f"An audit needs some time: give --minutes a number above 0 and below {_MOST_MINUTES}.")

    @property
    def scale(self) -> Scale:
        """How much is attacked."""
        return QUICK if self.quick else FULL

    def key(self, *purpose: object) -> bytes:
        """Key of the noise of one part of the audit: the same seed gives the same report."""
        return hashlib.sha256(repr(("fedsea audit", self.seed, *purpose)).encode()).digest()


class Clock:
    """The time budget, and who is told how far things are. Until `start` is called nothing is ended by it.

    Args:
        minutes: From the start on.
        show: Told of progress.
        now: Seconds; replaced in tests.

    Attributes:
        reserved_s: Seconds at the end that are kept for what comes later.
    """

    def __init__(self, minutes: float, show: Show, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._budget_s = 60 * minutes
        self._end = math.inf
        self._show = show
        self.reserved_s = 0.0

    def start(self) -> None:
        """From now on time is counted."""
        self._end = self._now() + self._budget_s

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The time of what is done inside does not count."""
        began = self._now()
        yield
        self._end += self._now() - began

    @property
    def left_s(self) -> float:
        """Seconds that are left beside what is reserved."""
        return max(0.0, self._end - self.reserved_s - self._now())

    def watch(self, what: str, share: float = 1.0, *, ends: bool = True) -> Progress:
        """A `Progress` that shows, and ends the work when this share of the time that is left now is up.

        Args:
            what: As it is shown.
            share: Of what is left.
            ends: False for work that has to be done however long it takes.
        """
        end = self._now() + share * self.left_s if ends else math.inf

        def told(done: int, total: int) -> None:
            self._show(what, done, total)
            if done < total and self._now() >= end:
                raise OutOfTime

        return told
