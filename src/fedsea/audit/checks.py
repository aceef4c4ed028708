"""Whether the bytes hold what the plan promises: found by looking, before any attack.

n  values of a channel over all sequences
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fedsea.audit.observe import Tapped
from fedsea.audit.subject import Subject
from fedsea.audit.verdict import Finding, Verdict
from fedsea.plan import NoiseSection
from fedsea.privacy.clip import clip_rows, clip_sequences
from fedsea.types import Channel

_TOLERANCE = 0.01
_SIGMAS = 4.0
_SAME_NOISE = 0.5
"""Correlation of the noise of two releases above which it is one and the same; independent noise stays near 0."""

_WORDS = {Channel.HIDDEN: "hidden states", Channel.GRADIENT: "gradients", Channel.UPDATE: "updates"}


def check_taps(
    subject: Subject, taps: Mapping[Channel, Sequence[Tapped]], codecs: Mapping[Channel, str]
) -> list[Finding]:
    """Compare what was before the boundary with what the server decoded.

    Args:
        subject: The plan says which noise there is to be.
        taps: Channel to its releases.
        codecs: Channel to codec, for what it rounds away.
    """
    noise = subject.plan.noise if subject.plan.trust.mode == "noised" else NoiseSection()
    protected = [channel for channel in taps if noise.std(channel)]
    findings = []
    for channel, releases in taps.items():
        if noise.std(channel):
            findings += _check_noise(channel, releases, noise, codecs.get(channel, "fp32"))
        elif protected:
            findings.append(
                Finding(
                    Verdict.PARTIAL if channel is Channel.UPDATE else Verdict.EXPOSED,
                    f"A channel was forgotten: {_WORDS[protected[0]]} get noise, but {_WORDS[channel]} leave without "
                    f"any, and tell as much: set noise.{channel}_std.",
                )
            )
    return findings


def _check_noise(channel: Channel, releases: Sequence[Tapped], noise: NoiseSection, codec: str) -> list[Finding]:
    std, what = noise.std(channel), _WORDS[channel]
    parts = [(tapped.seen_TH - _clipped(tapped.raw_TH, channel, noise)).flatten().double() for tapped in releases]
    added = torch.cat(parts)
    rounding = _rounding(releases, codec)
    measured = math.sqrt(max(0.0, float(added.square().mean()) - rounding))
    if measured < std / 2:
        return [
            Finding(
                Verdict.EXPOSED,
                f"Noise is configured but not applied: the plan puts a standard deviation of {std:g} on {what}, and "
                f"what is sent differs from what was computed by {measured:.3g}.",
            )
        ]
    findings = []
    tolerance = max(_TOLERANCE, _SIGMAS / math.sqrt(2 * added.numel()))
    if abs(measured / std - 1) > tolerance:
        findings.append(
            Finding(
                Verdict.EXPOSED if measured < std else Verdict.BROKEN,
                f"The noise on {what} has a standard deviation of {measured:.4g}, and the plan says {std:g}.",
            )
        )
    if _reused(parts):
        findings.append(
            Finding(
                Verdict.EXPOSED,
                f"The same noise was used twice on {what}: the difference of two releases has none left.",
            )
        )
    return findings


def _clipped(raw_TH: torch.Tensor, channel: Channel, noise: NoiseSection) -> torch.Tensor:
    """What noise is added to."""
    clip = noise.clip(channel)
    if not clip:
        return raw_TH
    if noise.unit == "token":
        return clip_rows(raw_TH, clip)
    return clip_sequences(raw_TH, (len(raw_TH),), clip)


def _rounding(releases: Sequence[Tapped], codec: str) -> float:
    """Mean square of what a codec rounds away."""
    seen_TH = torch.cat([tapped.seen_TH for tapped in releases]).double()
    match codec:
        case "int8":
            return float(((seen_TH.abs().amax(dim=1) / 127) ** 2 / 12).mean())
        case "bf16":
            return float(seen_TH.square().mean()) * 2.0**-18 / 3
        case "fp16":
            return float(seen_TH.square().mean()) * 2.0**-24 / 3
    return 0.0


def _reused(parts: Sequence[torch.Tensor]) -> bool:
    """Whether two releases have the same noise: their first values are correlated."""
    width = min(len(part) for part in parts)
    if len(parts) < 2 or width < 64:
        return False
    rows = torch.stack([part[:width] for part in parts])
    rows = rows / rows.norm(dim=1, keepdim=True)
    alike = (rows @ rows.T).fill_diagonal_(0.0)
    return bool(alike.max() > _SAME_NOISE)
