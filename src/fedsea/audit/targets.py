"""What the audit attacks and what an attack says; the truth in a `Target` is read by the scoring alone.

T  tokens of one sequence, H  hidden size, V  vocabulary size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Told (done, of how many); raises `OutOfTime` when the audit's time is up."""


class OutOfTime(Exception):  # noqa: N818 (not an error: the audit says what it did not get to)
    """The time budget ended in the middle of an attack."""


def unheard(_done: int, _total: int) -> None:
    """A `Progress` that nobody listens to."""


def within(progress: Progress, number: int, total: int) -> Progress:
    """For the work of one of several parts: shows nothing new, and ends when the time is up."""
    return lambda _done, _all: progress(number, total)


@dataclass(frozen=True, slots=True)
class Secret:
    """A planted identifier: its type ("name", "phone", "mail", "id") and how it is written in the text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What the server sees of one sequence in one pass, decoded from the bytes that were sent. No token ids.

    Attributes:
        hidden_TH: Hidden states at the trunk's input.
        gradient_TH: Gradient at the trunk's output; None if the plan sends none.
        length: Rows.
        output_TH: The trunk's output as the server computed it from `hidden_TH` (before its own codec).
        base: The attacker's own key of the client's model state, 0 unless a run moved on between passes.
        most_rows: Rows that its session was opened for, as the client told the server; 0: it was sent whole.
        hidden_passes: Passes of which the noise on the hidden states is the mean; see `audit.passes`.
        gradient_passes: Likewise on the gradient.
    """

    hidden_TH: torch.Tensor
    gradient_TH: torch.Tensor | None
    length: int
    output_TH: torch.Tensor | None = None
    base: int = 0
    most_rows: int = 0
    hidden_passes: float = 1.0
    gradient_passes: float = 1.0


@dataclass(slots=True)
class Target:
    """One sequence of the client and what the server saw of it.

    Attributes:
        text: Truth, for scoring and for the report.
        ids_T: Truth, for scoring only.
        targets_T: Next-token targets, `IGNORE` where no loss is taken; which rows carry loss shows in the gradients.
        secrets: Identifiers in the text.
        observations: One for each pass (epoch) over it.
        means: The same passes, each with the noise that the mean of several has; empty if none stands for more.
        begins: Leading tokens that every sequence has (BOS): known to everybody, so not scored.
        own: It is a text of the user's, not a planted note.
    """

    text: str
    ids_T: torch.Tensor
    targets_T: torch.Tensor
    secrets: tuple[Secret, ...] = ()
    observations: list[Observation] = field(default_factory=list)
    begins: int = 0
    own: bool = False
    means: list[Observation] = field(default_factory=list)

    @property
    def passes(self) -> list[Observation]:
        """All that is known of the text when every pass over it is put together."""
        return self.means or self.observations


def chosen(targets: Sequence[Target], count: int) -> list[int]:
    """Places of so many targets, half of them of the user's own texts as far as there are any, planted notes first."""
    planted, own = ([i for i, target in enumerate(targets) if target.own is is_own] for is_own in (False, True))
    num_own = min(len(own), max(count // 2, count - len(planted)))
    return planted[: count - num_own] + own[:num_own]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an attack says a sequence was.

    Attributes:
        ids_T: Token ids, one a position.
        scored_T: Positions that the attack could speak about; None: all.
        note: A sentence about this attack's own quality, e.g. a shortlist's recall.
        shortlist_recall: Share of positions at which the truth was among the candidates; 1.0 for an exhaustive search.
        cut_short: The time was up before all was put together that says something about this text, or before the attack
            had learned all that it can.
    """

    ids_T: torch.Tensor
    scored_T: torch.Tensor | None = None
    note: str = ""
    shortlist_recall: float = 1.0
    cut_short: bool = False
