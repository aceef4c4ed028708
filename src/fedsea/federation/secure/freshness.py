"""Whether the masks of secure aggregation were fresh, judged from what the server received; for the audit.

A mask used twice is no mask: the difference of two inputs under it is the difference of their values, which are small
against 2^64, while the difference of two inputs under fresh masks is uniform. That shows in the words' top byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedsea.federation.secure.messages import Advertisement

_FEWEST_WORDS = 64
_SIGMAS = 8.0


@dataclass(frozen=True, slots=True)
class Transcript:
    """What the server received from one client in one attempt.

    Attributes:
        client: Its name.
        round: The round.
        attempt: The attempt, as the server counts.
        keys: What it advertised; None if that was not recorded.
        tensors: Its masked int64 tensors by name; empty if it dropped out before.
    """

    client: str
    round: int
    attempt: int
    keys: Advertisement | None
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be.

    Attributes:
        kind: "key reused", "mask reused" or "not masked".
        clients: Whose.
        detail: A sentence for the report; no values.
    """

    kind: str
    clients: tuple[str, ...]
    detail: str


def check_fresh(transcripts: Iterable[Transcript]) -> list[Finding]:
    """Keys and masks that were used twice, and words that no mask is on.

    Args:
        transcripts: Of any clients, rounds and attempts of one run.
    """
    seen = list(transcripts)
    return [*_reused_keys(seen), *_unmasked(seen), *_reused_masks(seen)]


def _where(transcript: Transcript) -> str:
    return f"round {transcript.round}, attempt {transcript.attempt}"


def _reused_keys(transcripts: list[Transcript]) -> list[Finding]:
    first: dict[bytes, Transcript] = {}
    findings = []
    for transcript in transcripts:
        if transcript.keys is None:
            continue
        for kind in ("sharing_key", "mask_key", "commitment"):
            before = first.setdefault(getattr(transcript.keys, kind), transcript)
            if before is not transcript:
                who = tuple(sorted({before.client, transcript.client}))
                sentence = f"The {kind} of {_where(before)} was used again in {_where(transcript)}."
                findings.append(Finding("key reused", who, sentence))
    return findings


def _unmasked(transcripts: list[Transcript]) -> list[Finding]:
    findings = []
    for transcript in transcripts:
        if _looks_small(_words(transcript)):
            sentence = f"What was sent in {_where(transcript)} is not spread over all 64 bits: no mask is on it."
            findings.append(Finding("not masked", (transcript.client,), sentence))
    return findings


def _reused_masks(transcripts: list[Transcript]) -> list[Finding]:
    findings = []
    with_words = [t for t in transcripts if t.tensors]
    for position, later in enumerate(with_words):
        for before in with_words[:position]:
            one, other = _words(before), _words(later)
            if later.client == before.client and len(one) == len(other) and _looks_small(one - other):
                sentence = f"What was sent in {_where(before)} and in {_where(later)} is under the same mask."
                findings.append(Finding("mask reused", (later.client,), sentence))
    return findings


def _words(transcript: Transcript) -> np.ndarray:
    parts = [t.contiguous().view(-1).numpy().view(np.uint64) for _, t in sorted(transcript.tensors.items())]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _looks_small(words: np.ndarray) -> bool:
    """Whether far more words than of a uniform draw have a top byte of 0 or 255, as small signed numbers have."""
    if len(words) < _FEWEST_WORDS:
        return False
    top = (words >> np.uint64(56)).astype(np.int64)
    found, expected = int(((top == 0) | (top == 255)).sum()), len(words) / 128
    return found > expected + _SIGMAS * math.sqrt(expected) + 1
