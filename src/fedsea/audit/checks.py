"""Whether the bytes hold what the plan promises: found by looking, before any attack.

n  values of a channel over all sequences
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedsea.audit.noise_rows import Added, can_be_compared, shared, uneven, used_twice
from fedsea.audit.observe import Tapped, clipped
from fedsea.audit.subject import Subject
from fedsea.audit.verdict import Finding, Verdict
from fedsea.plan import NoiseSection
from fedsea.types import Channel
from fedsea.wire.codecs import as_decoded

_TOLERANCE = 0.01
_SIGMAS = 5.0
_BLIND = 0.5
"""Relative error of the noise's variance from which on nothing is said about it."""

_WORDS = {Channel.HIDDEN: "hidden states", Channel.GRADIENT: "gradients", Channel.UPDATE: "updates"}
_IN_USE = "hidden states in use (of prompts and answers)"
_IN_EVALUATION = "hidden states of evaluation"


@dataclass(frozen=True, slots=True)
class _Noised:
    """All releases of a channel that gets noise.

    Attributes:
        what: They are, in words.
        std: Of the noise as planned.
        codec: Of the channel.
        seen: As decoded.
        clipped: What the noise was added to.
        added: What was added.
    """

    what: str
    std: float
    codec: str
    seen: Sequence[torch.Tensor]
    clipped: Sequence[torch.Tensor]
    added: Sequence[Added]

    @classmethod
    def of(
        cls, channel: Channel, releases: Sequence[Tapped], noise: NoiseSection, codec: str, what: str = ""
    ) -> _Noised:
        std = noise.std(channel)
        seen, before = [one.seen_TH for one in releases], [clipped(one, channel, noise) for one in releases]
        added = [Added.of(*rows, std, codec) for rows in zip(seen, before, strict=True)]
        return cls(what or _WORDS[channel], std, codec, seen, before, added)


def check_taps(
    subject: Subject,
    taps: Mapping[Channel, Sequence[Tapped]],
    codecs: Mapping[Channel, str],
    used: Sequence[Tapped] = (),
    evaluated: Sequence[Tapped] = (),
) -> list[Finding]:
    """Compare what was before the boundary with what the server decoded.

    Args:
        subject: The plan says which noise there is to be.
        taps: Channel to its releases in training.
        codecs: Channel to codec, for what it rounds away.
        used: Hidden states of sessions, message by message. Noise that training has and use has not is a fault of
            fedsea itself.
        evaluated: Hidden states of texts that are evaluated; likewise.
    """
    noise = subject.plan.noise if subject.plan.trust.mode == "noised" else NoiseSection()
    noised = {
        channel: _Noised.of(channel, releases, noise, codecs.get(channel, "fp32"))
        for channel, releases in taps.items()
        if noise.std(channel)
    }
    findings: list[Finding] = []
    for channel in taps:
        if channel in noised:
            findings += _check_noise(noised[channel])
        elif noised:
            findings.append(
                Finding(
                    Verdict.PARTIAL if channel is Channel.UPDATE else Verdict.EXPOSED,
                    f"A channel was forgotten: {next(iter(noised.values())).what} get noise, but {_WORDS[channel]} "
                    f"leave without any, and tell as much: set noise.{channel}_std.",
                )
            )
    in_training = [noised[channel] for channel in (Channel.HIDDEN, Channel.GRADIENT) if channel in noised]
    if len(in_training) > 1 and shared(*(one.added for one in in_training)):
        findings.append(
            Finding(Verdict.EXPOSED, "The same noise was used on hidden states and on gradients: it is seen in both.")
        )
    if not noise.std(Channel.HIDDEN):
        return findings
    before = [(one, f"{one.what} of training") for one in in_training]
    for releases, what in ((used, _IN_USE), (evaluated, _IN_EVALUATION)):
        if releases:
            one = _Noised.of(Channel.HIDDEN, releases, noise, codecs.get(Channel.HIDDEN, "fp32"), what)
            findings += _check_beside(one, before)
            before.append((one, what))
    return findings


def _check_beside(beside: _Noised, before: Sequence[tuple[_Noised, str]]) -> list[Finding]:
    """What leaves beside training; `before` it came releases that are named so in words."""
    found = _check_noise(beside)
    for one, what in before:
        if shared(beside.added, one.added):
            words = f"The same noise was used on {what} and on {beside.what}: it is seen in both."
            found.append(Finding(Verdict.BROKEN, words))
    return [one if one.verdict is Verdict.INCONCLUSIVE else replace(one, verdict=Verdict.BROKEN) for one in found]


def _check_noise(noised: _Noised) -> list[Finding]:
    std, what, codec = noised.std, noised.what, noised.codec
    parts = [
        (seen_TH - rows_TH).flatten().double() for seen_TH, rows_TH in zip(noised.seen, noised.clipped, strict=True)
    ]
    found, none, whole = _squares(parts, noised.clipped, std, codec)
    tolerance = 2 * max(_TOLERANCE, _SIGMAS * math.sqrt(1 / sum(map(len, parts))) * whole / max(whole - none, 1e-30))
    if tolerance > _BLIND:
        return [
            Finding(
                Verdict.INCONCLUSIVE,
                f"Whether the noise on {what} is applied cannot be seen: {codec} rounds away more than it adds. Audit "
                "the plan with fp32 codecs as well.",
            )
        ]
    share = (found - none) / (whole - none)
    measured = std * math.sqrt(max(0.0, share))
    if share < 1 / 4:
        return [
            Finding(
                Verdict.EXPOSED,
                f"Noise is configured but not applied: the plan puts a standard deviation of {std:g} on {what}, and "
                f"what is sent differs from what was computed by {measured:.3g}.",
            )
        ]
    if abs(share - 1) <= tolerance:
        return _check_rows(noised)
    mismatch = Finding(
        Verdict.EXPOSED if measured < std else Verdict.BROKEN,
        f"The noise on {what} has a standard deviation of {measured:.4g}, and the plan says {std:g}.",
    )
    return [mismatch, *_check_rows(noised, even=False)]


def _check_rows(noised: _Noised, *, even: bool = True) -> list[Finding]:
    """Reuse first: noise that comes again makes rows and columns uneven, too."""
    added, std, what = noised.added, noised.std, noised.what
    if used_twice(added):
        words = f"The same noise was used twice on {what}: the difference of two rows has none left."
        return [Finding(Verdict.EXPOSED, words)]
    findings = []
    if even and (off := uneven(added, std)):
        words = (
            f"The noise on {what} is not the same everywhere: in {len(off)} rows or columns it has a standard "
            f"deviation of {min(off):.3g} to {max(off):.3g}, and the plan says {std:g}."
        )
        findings.append(Finding(Verdict.EXPOSED if min(off) < std else Verdict.BROKEN, words))
    if not can_be_compared(added):
        words = (
            f"Whether noise on {what} is used twice or left out of some rows cannot be seen: rows are too narrow, or "
            f"{noised.codec} rounds more coarsely than the noise. Audit the plan with fp32 codecs as well."
        )
        findings.append(Finding(Verdict.INCONCLUSIVE, words))
    return findings


def _squares(
    parts: Sequence[torch.Tensor], clipped: Sequence[torch.Tensor], std: float, codec: str
) -> tuple[float, float, float]:
    """Mean squares of what was added: as found, as the codec alone adds it, and as it does with the plan's noise."""
    draw = torch.Generator().manual_seed(0)  # protects nothing: only its mean square is looked at
    coded = [as_decoded(codec, rows_TH) - rows_TH for rows_TH in clipped]
    noised = [
        as_decoded(codec, rows_TH + std * torch.randn(rows_TH.shape, generator=draw)) - rows_TH for rows_TH in clipped
    ]
    groups = (parts, coded, noised)
    found, none, whole = (float(torch.cat([p.flatten().double() for p in g]).square().mean()) for g in groups)
    return found, none, whole
