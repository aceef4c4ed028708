"""A0: the public model's own guesses, without looking at anything that was sent. What any attack must beat."""

from __future__ import annotations

from collections.abc import Sequence

from fedsea.audit.attacker import Attacker
from fedsea.audit.targets import Progress, Recovered, Target, unheard


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """The likeliest token at every position, given the true ones before it: more than an attacker knows."""
    answers = []
    for number, target in enumerate(targets):
        answers.append(Recovered(attacker.expected(target.ids_T).argmax(dim=1)))
        progress(number + 1, len(targets))
    return answers
