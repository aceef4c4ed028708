"""How many planted identifiers a recogniser finds, and how much it takes for one that is none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsea.evaluation.notes.writer import Note
from fedsea.privacy.pseudonyms.spans import Span

_Z = 1.959964
_COUNTS = ("planted", "found", "touched", "replaced", "right")


@dataclass(slots=True)
class Score:
    """Of one type.

    Attributes:
        planted: Identifiers of the type.
        found: Those of them that are replaced from their first letter to their last.
        touched: Those of which a part is replaced and a part is left.
        replaced: Places that were taken for the type.
        right: Those of them that share a letter with an identifier of any type.
        by_form: Form to planted and found.
    """

    planted: int = 0
    found: int = 0
    touched: int = 0
    replaced: int = 0
    right: int = 0
    by_form: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, other: Score) -> None:
        """Take another score in, without its forms."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with recall, its 95 % interval (Wilson), and precision."""
        low, high = wilson(self.found, self.planted)
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "recall": self.found / self.planted if self.planted else None,
            "recall_95": [low, high],
            "precision": self.right / self.replaced if self.replaced else None,
            "by_form": {form: {"planted": n, "found": k} for form, (n, k) in sorted(self.by_form.items()) if form},
        }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    >>> [round(value, 3) for value in wilson(98, 100)]
    [0.93, 0.994]
    """
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z * _Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(
    notes: Iterable[Note], find: Callable[[str], Sequence[Span]], types: Sequence[str] | None = None
) -> dict[str, Score]:
    """Scores by type, "all" among them.

    Args:
        notes: With their plants.
        find: The recogniser.
        types: Types that it was told to find; plants of others do not count. None: all.
    """
    scores: dict[str, Score] = defaultdict(Score)
    for note in notes:
        spans = find(note.text)
        covered = {at for span in spans for at in range(span.start, span.end)}
        for plant in note.plants:
            if types is not None and plant.kind not in types:
                continue
            score = scores[plant.kind]
            letters = {at for at in range(plant.start, plant.end) if note.text[at].isalnum()}
            whole = letters <= covered
            score.planted += 1
            score.found += whole
            score.touched += bool(letters & covered) and not whole
            counts = score.by_form[plant.form]
            counts[0] += 1
            counts[1] += whole
        secret = {at for plant in note.plants for at in range(plant.start, plant.end)}
        for span in spans:
            scores[span.kind].replaced += 1
            scores[span.kind].right += not secret.isdisjoint(range(span.start, span.end))
    whole_score = Score()
    for score in scores.values():
        whole_score.add(score)
    return {**dict(sorted(scores.items())), "all": whole_score}
