"""A5, the backward channel: the gradient at the trunk's output names the next token of every row that carries loss.

Noise on the forward channel does not stand in its way: the server's outputs are what they are, whatever it computed
them from, and the client's gradient is taken at exactly these outputs.

T  tokens of a sequence, V  vocabulary size
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.a4_averaging import averaged
from fedsea.audit.attacks.label_decoding import NO_LABEL, DecodedLabels, decode_labels
from fedsea.audit.attacks.search import search
from fedsea.audit.targets import Observation, Progress, Recovered, Target, unheard
from fedsea.types import IGNORE, Channel
from fedsea.wire.codecs import as_decoded

UNKNOWN = -1
"""Stands for a token of which the gradients say nothing."""


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Decode each target's text from its gradients; several passes over a text are put together.

    A row's gradient speaks of the token after it. So the first token is never scored, nor are those whose row carries
    no loss (a prompt's, with `loss_on = "completion"`). Which rows these are the attack has to find out; the scoring
    takes it from the truth, so that a label that noise hides counts as one that was missed. Where both channels are
    noised, what both say of each token is put together in one search, with the public model's expectation (A2).

    Args:
        attacker: What the server knows. When its time is up, the passes that were decoded by then are put together; the
            first one over each text always is.
        targets: With gradients in their observations.
        progress: Told of every pass over a text.

    Returns:
        For each target; without any gradient, nothing is scored.
    """
    answers, evidence = [], []
    passes, all_passes = _decoded(attacker, targets, progress)
    for target, decoded in zip(targets, passes, strict=True):
        answers.append(replace(_answer(attacker, target, decoded), cut_short=not all_passes))
        evidence.append(together(decoded)[1] if decoded else None)
    noised = [attacker.noise_std.get(channel, 0.0) > 0 for channel in (Channel.HIDDEN, Channel.GRADIENT)]
    return _joint(attacker, targets, answers, evidence, progress) if all(noised) else answers


def _decoded(
    attacker: Attacker, targets: Sequence[Target], progress: Progress
) -> tuple[list[list[DecodedLabels]], bool]:
    """What the passes over each target say, and whether there was time for all of them."""
    until = time.monotonic() + attacker.budget_s
    found: list[list[DecodedLabels]] = [[] for _ in targets]
    whole = [[seen for seen in target.passes if seen.gradient_TH is not None] for target in targets]
    order = [(number, i) for i, seen in enumerate(whole) for number in range(len(seen))]
    for done, (number, i) in enumerate(sorted(order)):
        progress(done, len(order))
        if number and time.monotonic() > until:
            return found, False
        found[i].append(decode(attacker, whole[i][number]))
    progress(len(order), len(order))
    return found, True


def _joint(
    attacker: Attacker,
    targets: Sequence[Target],
    answers: Sequence[Recovered],
    evidence: Sequence[torch.Tensor | None],
    progress: Progress,
) -> list[Recovered]:
    """Search each text with what both channels say of it; which tokens are scored stays as it was."""
    seen = []
    for target, evidence_TV in zip(targets, evidence, strict=True):
        both = averaged(attacker, target)
        if evidence_TV is not None:  # a row's gradient speaks of the token after it
            both = replace(both, evidence_TV=torch.cat([torch.zeros_like(evidence_TV[:1]), evidence_TV[:-1]]))
        else:
            both = replace(both, evidence_TV=torch.zeros(len(both.rows_TH), attacker.vocab_size))
        seen.append(both)
    truths = [target.ids_T for target in targets]
    found = search(attacker, seen, truths, beam=attacker.beam, prior=True, progress=progress)
    return [
        replace(new, scored_T=old.scored_T, cut_short=old.cut_short) for new, old in zip(found, answers, strict=True)
    ]


def decode(attacker: Attacker, seen: Observation) -> DecodedLabels:
    """What one gradient of one sequence says."""
    assert seen.gradient_TH is not None
    output_TH = _as_sent(attacker, outputs_of(attacker, seen)).to(attacker.base.device)
    gradient_TH = seen.gradient_TH.float().to(attacker.base.device)
    return decode_labels(
        attacker.output_blocks,
        output_TH,
        gradient_TH,
        (seen.length,),
        noise_std_T=(attacker.row_variance(Channel.GRADIENT, gradient_TH) / seen.gradient_passes).sqrt(),
        every_row=attacker.plan.data.loss_on == "all",
    )


def outputs_of(attacker: Attacker, seen: Observation) -> torch.Tensor:
    """The server's own trunk outputs [T, H] for what it received."""
    if seen.output_TH is not None:
        return seen.output_TH.float()
    with torch.no_grad():
        return attacker.trunk(seen.hidden_TH.float().to(attacker.base.device), (seen.length,)).float()


def _as_sent(attacker: Attacker, output_TH: torch.Tensor) -> torch.Tensor:
    """Outputs as the client decoded them: the gradient is taken there."""
    return as_decoded(attacker.codecs.get(Channel.HIDDEN, "fp32"), output_TH)


def together(decoded: Sequence[DecodedLabels]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Several passes over one text: labels [T], summed likelihood [T, V], mean prior [T, V].

    The noise of the passes is independent, so their likelihoods multiply; the text and so its prior is one and the
    same.
    """
    likelihood_TV = torch.stack([one.likelihood_TV for one in decoded]).sum(0)
    likelihood_TV = likelihood_TV - likelihood_TV.amax(-1, keepdim=True)
    prior_TV = torch.stack([one.prior_TV for one in decoded]).mean(0)
    silent_T = torch.stack([one.labels_T == NO_LABEL for one in decoded]).float().mean(0) > 0.5
    labels_T = torch.where(silent_T, NO_LABEL, (likelihood_TV + prior_TV).argmax(-1))
    return labels_T, likelihood_TV, prior_TV


def _answer(attacker: Attacker, target: Target, decoded: Sequence[DecodedLabels]) -> Recovered:
    length = target.observations[0].length
    ids_T, scored_T = torch.full((length,), UNKNOWN), torch.zeros(length, dtype=torch.bool)
    begins = torch.tensor(attacker.beginning[:length], dtype=torch.long)
    ids_T[: len(begins)] = begins
    if not decoded:
        return Recovered(ids_T, scored_T, "the plan sends no gradients")
    labels_T, _, _ = together(decoded)
    said_T = labels_T[:-1]
    ids_T[1:] = torch.where(said_T == NO_LABEL, ids_T[1:], said_T)
    scored_T[1:] = target.targets_T[: length - 1] != IGNORE
    return Recovered(ids_T, scored_T)
