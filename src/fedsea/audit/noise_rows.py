"""The noise of each row: whether all rows and columns have as much of it as the plan says, and none has another's.

That noise as planned is found to be at fault has a probability under `FALSE_ALARM` for each question, by bounds without
approximation: Chernoff's for the mean square of k normal values, and for the cosine of two of them in k dimensions
P(cosine > t) <= (1 - t²)^((k - 1) / 2) / 2.

R  rows of one release, H  values of a row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsea.wire.codecs import CODECS

FALSE_ALARM = 1e-7
"""Of each question; an audit asks some ten."""
_LEAST_WIDTH = 16
"""Values of two rows by which it can be told whether their noise is the same."""
_SAME_NOISE = 0.5
"""Least cosine that is called the same noise, however wide the rows are: independent noise stays near 0."""
_MOST_WORK = 2e10
"""Multiplications of one question, some seconds: 17 000 rows of 64 values, 2 200 of 4096. Of more rows than it allows
some are drawn, by lot: noise that comes again does so anywhere in a text."""
_AT_ONCE = 1024
"""Rows that are compared with all others in one go."""
_UPDATE_WIDTH = 64
"""An update has no rows; so many values, end to end, are taken for one."""
_ROUNDED = 13 / 12
"""Mean square, as a multiple of the noise's, that is still right: a codec whose step is the noise's adds a 12th."""
_LEAST_NOISE = 1 / 4
"""Mean square, as a multiple of the noise's, of a row that has any noise: what the codec alone makes of equal values is
equal, too."""
_REACH = 4.0
"""Standard deviations that noise adds to a value at most, for how coarsely that is rounded."""


@dataclass(frozen=True, slots=True)
class Added:
    """What was added to the rows of one release.

    Attributes:
        added_RH: What was sent less what the noise was added to; 0 where `judged_RH` is not.
        judged_RH: Values that the codec rounds no more coarsely than by a step of the noise's standard deviation:
            only there is what was added the noise, and not what the codec made of the value itself.
        units_RH: Rows that have values and noise enough to be known again, each of norm 1; as many as can be compared.
        width: The least number of judged values of those that have; 0 if none has.
    """

    added_RH: torch.Tensor
    judged_RH: torch.Tensor
    units_RH: torch.Tensor
    width: int

    @classmethod
    def of(cls, seen_RH: torch.Tensor, clipped_RH: torch.Tensor, std: float, codec: str) -> Added:
        """Of a release.

        Args:
            seen_RH: As decoded; of an update [N, 1].
            clipped_RH: What the noise was added to.
            std: The noise's.
            codec: Of the channel.
        """
        if clipped_RH.shape[1] == 1:
            whole = len(clipped_RH) // _UPDATE_WIDTH * _UPDATE_WIDTH
            seen_RH, clipped_RH = (rows[:whole].view(-1, _UPDATE_WIDTH) for rows in (seen_RH, clipped_RH))
        judged_RH = CODECS[codec].steps(clipped_RH.abs() + _REACH * std) <= std
        added_RH = torch.where(judged_RH, seen_RH - clipped_RH, 0.0)
        counts_R = judged_RH.sum(1)
        has_noise_R = added_RH.square().sum(1) >= _LEAST_NOISE * std**2 * counts_R
        fit_R = (counts_R >= max(_LEAST_WIDTH, judged_RH.shape[1] / 2)) & has_noise_R
        rows_RH = _some(added_RH[fit_R])
        width = int(counts_R[fit_R].min()) if len(rows_RH) else 0
        return cls(added_RH, judged_RH, rows_RH / rows_RH.norm(dim=1, keepdim=True), width)


def uneven(releases: Sequence[Added], std: float) -> list[float]:
    """Standard deviations of rows and columns that have not the plan's noise, however it was drawn.

    Args:
        releases: All of one channel.
        std: What the plan says.
    """
    squares = [one.added_RH.double().square() for one in releases]
    sums_N, counts_N = _by_row_and_column(squares), _by_row_and_column([one.judged_RH for one in releases])
    ratios_N = sums_N / counts_N.clamp(min=1) / std**2
    ratios_N = torch.where(ratios_N > 1, (ratios_N / _ROUNDED).clamp(min=1), ratios_N)
    surprises_N = counts_N / 2 * (ratios_N - 1 - ratios_N.clamp(min=1e-300).log())
    off_N = surprises_N > math.log(2 * max(1, len(sums_N)) / FALSE_ALARM)
    return [std * ratio**0.5 for ratio in ratios_N[off_N].tolist()]


def _by_row_and_column(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sums of every block's rows, and of the columns of all."""
    return torch.cat([*(block_RH.sum(1) for block_RH in blocks), torch.cat([*blocks]).sum(0)])


def can_be_compared(releases: Sequence[Added]) -> bool:
    """Whether any row has values enough for its noise to be known again; nothing to compare is no reason for doubt."""
    return not any(len(one.added_RH) for one in releases) or any(one.width for one in releases)


def used_twice(releases: Sequence[Added]) -> bool:
    """Whether two rows of one release, or of two, have the same noise; of very many rows see `_MOST_WORK`."""
    units_NH, width = _units(releases)
    blocks = [(_some(units_NH), width)]
    if len(blocks[0][0]) < len(units_NH):
        blocks += [(one.units_RH, one.width) for one in releases]
    pairs = sum(len(units_RH) * (len(units_RH) - 1) / 2 for units_RH, _ in blocks)
    return any(_most_alike(units_RH) > _limit(width, pairs) for units_RH, width in blocks if len(units_RH) > 1)


def shared(first: Sequence[Added], second: Sequence[Added]) -> bool:
    """Whether a row of one channel, or of use, has the noise of one of the other; rows of other widths have not."""
    (ours_RH, our_width), (theirs_RH, their_width) = _units(first), _units(second)
    if not len(ours_RH) or not len(theirs_RH) or ours_RH.shape[1] != theirs_RH.shape[1]:
        return False
    ours_RH, theirs_RH = _some(ours_RH), _some(theirs_RH)
    limit = _limit(min(our_width, their_width), len(ours_RH) * len(theirs_RH))
    return any(float((block_RH @ theirs_RH.T).max()) > limit for block_RH in torch.split(ours_RH, _AT_ONCE))


def _units(releases: Sequence[Added]) -> tuple[torch.Tensor, int]:
    """Those of all releases, and their least width."""
    units_NH = torch.cat([one.units_RH for one in releases])
    return units_NH, min((one.width for one in releases if one.width), default=0)


def _some(rows_NH: torch.Tensor) -> torch.Tensor:
    """As many rows as can be compared with one another, in their order; the same ones each time."""
    most = int((_MOST_WORK / rows_NH.shape[1]) ** 0.5)
    if len(rows_NH) <= most:
        return rows_NH
    draw = torch.Generator().manual_seed(len(rows_NH))  # protects nothing: where fedsea goes wrong it does so by itself
    return rows_NH[torch.randperm(len(rows_NH), generator=draw)[:most].sort().values]


def _most_alike(units_NH: torch.Tensor) -> float:
    """The greatest cosine of any two rows; each pair is looked at once."""
    most = -1.0
    for start in range(0, len(units_NH), _AT_ONCE):
        rest_NH = units_NH[start:]
        cosines = rest_NH[:_AT_ONCE] @ rest_NH.T
        most = max(most, float(cosines.fill_diagonal_(-1.0).max()))
    return most


def _limit(width: int, pairs: float) -> float:
    """A cosine that no two of so many pairs of independent rows reach."""
    reached = math.sqrt(-math.expm1(2 / (width - 1) * math.log(2 * FALSE_ALARM / pairs)))
    return max(_SAME_NOISE, reached)
