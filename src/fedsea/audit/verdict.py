"""From scores to one word. None of the words means that a text is safe: they say what these attacks did.

- Attacks that recover text (A1 to A6, and answers: A10): EXPOSED if more than half of what the prior leaves open was
  recovered, or more than 5 % of the planted identifiers of any type; PARTIAL if anything beyond the prior was, with
  certainty.
- A7 names a set of tokens: by how far its F1 is above that of guessing the commonest, as a share of what the guess
  leaves open: EXPOSED above a half, PARTIAL if above 0 with certainty.
- A8 tells which texts were trained on, and recovers none: PARTIAL at most.
- A9 refutes a claim of the noise: EXPOSED if it does.
- What should have run and did not: INCONCLUSIVE, unless something worse was found.
- What has something to look at and was not asked for: INCONCLUSIVE, unless anything was found.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsea.audit.scoring import Score

EXPOSED_SHARE = 0.5
"""Of what the prior leaves open; so an excess of half of all tokens is always over it."""
EXPOSED_IDENTIFIERS = 0.05
"""Of the planted identifiers of one type."""
_CERTAIN_SEQUENCES = 6
"""With fewer, each of them may be above the prior by luck, once in 2^5 times, and then so is the interval's low end."""
LEAST_SHORTLIST_RECALL = 0.995
LEAST_SELF_CHECK = 0.95
"""What A1 must recover at k = 1 without noise; an audit that does not is broken."""


class Verdict(enum.StrEnum):
    """Worst last."""

    NOT_RECOVERED = "NOT RECOVERED BY THESE ATTACKS"
    PARTIAL = "PARTIAL"
    INCONCLUSIVE = "INCONCLUSIVE"
    EXPOSED = "EXPOSED"
    BROKEN = "BROKEN"

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Verdict.NOT_RECOVERED: 0,
    Verdict.PARTIAL: 20,
    Verdict.EXPOSED: 21,
    Verdict.INCONCLUSIVE: 22,
    Verdict.BROKEN: 23,
}


class OwnResult(Protocol):
    """What an attack gives that recovers no text (A7 may, A8 and A9 do not)."""

    @property
    def verdict(self) -> Verdict:
        """Of this attack alone."""
        ...

    @property
    def sentence(self) -> str:
        """What was found, in one line, with its figure."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with what was sent, found without any attack."""

    verdict: Verdict
    sentence: str


def of_score(score: Score) -> Verdict:
    """The verdict of one attack on one channel."""
    if score.excess_share.value > EXPOSED_SHARE or any(v > EXPOSED_IDENTIFIERS for v in score.identifiers.values()):
        return Verdict.EXPOSED
    if score.cut_short or score.shortlist_recall < LEAST_SHORTLIST_RECALL or not score.num_tokens:
        return Verdict.INCONCLUSIVE
    if score.excess.low > 0 or any(score.identifiers.values()):
        return Verdict.PARTIAL
    return Verdict.NOT_RECOVERED


def of_sets(score: Score, sets: Iterable[Score]) -> Verdict:
    """The worst of all texts together and of each set of them by itself; a few texts alone are no certain excess.

    Args:
        score: Of all.
        sets: Of parts of them.
    """
    found = [of_score(score)]
    for one in sets:
        verdict = of_score(one)
        if verdict is not Verdict.PARTIAL or one.num_sequences >= _CERTAIN_SEQUENCES:
            found.append(verdict)
    return worst(found)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several; nothing at all proves nothing.

    >>> worst([Verdict.PARTIAL, Verdict.NOT_RECOVERED]).value, worst([]).value
    ('PARTIAL', 'INCONCLUSIVE')
    """
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.INCONCLUSIVE)


def sentences(verdict: Verdict, findings: Sequence[Finding], skipped: Sequence[str]) -> list[str]:
    """What goes with the word."""
    said = [finding.sentence for finding in findings]
    match verdict:
        case Verdict.EXPOSED:
            said.append(
                "The server can read this: text or its tokens came back from what it receives, or a defence is off."
            )
        case Verdict.PARTIAL:
            said.append(
                "More was told than the public model guesses: some of the text, or which texts were trained on."
            )
        case Verdict.NOT_RECOVERED:
            said.append("These attacks did not reconstruct the text. Others may: this is no proof.")
        case Verdict.INCONCLUSIVE:
            said.append("Not all attacks were run to their end, or one's candidates missed the truth too often.")
        case Verdict.BROKEN:
            said.append(
                "Something is broken that has to work: the audit's own check, or a part of fedsea, as it stands above. "
                "Nothing else that this audit says can be relied on. Report this."
            )
    if skipped:
        said.append(f"Not run: {'; '.join(skipped)}.")
    return said
