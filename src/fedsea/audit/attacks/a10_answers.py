"""A10: answers, read from the outputs that the server itself computed. Noise on what is sent to it hides none of them.

A client chooses an answer's tokens from the trunk's outputs, with the output blocks and the head. The server has these
outputs, and the public weights of the rest (or what was sent to it), so it names the likeliest token behind each.
Nothing of it says more of the prompt than what was sent.

N  tokens of an answer, V  vocabulary size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.targets import Progress, Recovered, Target, unheard

_PRIOR = "its prior is what the public model guesses from the answer's own beginning, without the prompt"


@torch.no_grad()
def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Name the likeliest token behind each output from which one of an answer was chosen.

    Args:
        attacker: With the best output blocks that the server has.
        targets: Answers; the outputs that were observed are those of the prompt, too.
        progress: Told of answers.
    """
    found = []
    for number, target in enumerate(targets):
        output_TH = target.observations[0].output_TH
        assert output_TH is not None
        logits_TV = attacker.output_blocks(output_TH.to(attacker.base.device), (len(output_TH),))
        found.append(Recovered(logits_TV[-len(target.ids_T) :].argmax(dim=1).cpu(), note=_PRIOR))
        progress(number + 1, len(targets))
    return found


def guesses(attacker: Attacker, targets: Sequence[Target]) -> list[torch.Tensor]:
    """What the public model says at every position [N] to who knows the answer's tokens before it, but not the prompt.

    With the prompt the guess would often be the answer itself, and what noise on the prompt hides would count as known.
    """
    begins_T = torch.tensor(attacker.beginning, dtype=torch.long)
    found = []
    for target in targets:
        expected_TV = attacker.expected(torch.cat([begins_T, target.ids_T.long()]))
        found.append(expected_TV[len(begins_T) :].argmax(dim=1))
    return found
