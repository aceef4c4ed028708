"""A2: as A1, but candidates are weighed by the noise's own likelihood and by what the public model expects next.

    score(prefix) = sum over positions of  -|seen - computed|^2 / (2 sigma^2) + log p(token | prefix)

with sigma from the plan (the noise, and what the codec rounds away), by beam search.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.search import search, seen_once
from fedsea.audit.targets import Progress, Recovered, Target, unheard


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Recover every target from its first pass alone."""
    seen = [seen_once(attacker, target) for target in targets]
    truths = [target.ids_T for target in targets]
    return search(attacker, seen, truths, beam=attacker.beam, prior=True, progress=progress)
