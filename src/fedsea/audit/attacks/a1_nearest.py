"""A1: at every position the token whose hidden state, behind the prefix recovered so far, is nearest to the seen one.

The whole vocabulary is tried (SipIt, arXiv 2510.15511), unless it is so large that a shortlist is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.search import search, seen_once
from fedsea.audit.targets import Progress, Recovered, Target, unheard


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Recover every target from its first pass alone."""
    seen = [seen_once(attacker, target) for target in targets]
    return search(attacker, seen, [target.ids_T for target in targets], progress=progress)
