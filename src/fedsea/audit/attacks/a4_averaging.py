"""A4: fresh noise on the same text in every epoch averages out: E passes leave a variance of sigma^2 / E. Then A2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.search import Seen, search, unclipped
from fedsea.audit.targets import Progress, Recovered, Target, unheard
from fedsea.types import Channel


def averaged(attacker: Attacker, target: Target) -> Seen:
    """All passes over a target as one, with the variance that is left."""
    passes_ETH = torch.stack([observation.hidden_TH.float() for observation in target.passes])
    each = target.passes[0].hidden_passes
    variances_ET = torch.stack([attacker.row_variance(Channel.HIDDEN, rows_TH) for rows_TH in passes_ETH])
    variance_T = variances_ET.mean(dim=0) / each
    return unclipped(attacker, passes_ETH.mean(dim=0), variance_T / len(passes_ETH))


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Recover every target from all passes over it."""
    seen = [averaged(attacker, target) for target in targets]
    truths = [target.ids_T for target in targets]
    return search(attacker, seen, truths, beam=attacker.beam, prior=True, progress=progress)
