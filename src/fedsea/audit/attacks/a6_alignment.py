"""A6: texts that the attacker knows show what the client's own changes do to hidden states; it undoes that, then A2.

A secret rotation, a permutation and private adapters are all near enough to one affine map of the rows. The map is
fitted from what was seen to what the public weights compute: once as a rotation (orthogonal Procrustes), once by
least squares that shrink towards changing nothing; the better one on known texts that were left out is taken.

T  rows of all known texts, H  hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.search import search, seen_in, seen_once
from fedsea.audit.targets import Progress, Recovered, Target, unheard

Map = Callable[[torch.Tensor], torch.Tensor]

_SHRINKAGE = (1e-6, 1e-3, 1e-1)


def _rows(attacker: Attacker, known: Sequence[Target]) -> tuple[torch.Tensor, torch.Tensor]:
    """Seen and computed rows [T, H] of texts that the attacker knows, without the first (the same in every text)."""
    seen = [seen_in(attacker, o).rows_TH[1:] for target in known for o in target.observations]
    whole = [attacker.clipped(t.ids_T).cpu()[1:] / attacker.shrunk(len(t.ids_T)) for t in known for _ in t.observations]
    return torch.cat(seen), torch.cat(whole)


def _rotation(seen_TH: torch.Tensor, clean_TH: torch.Tensor) -> Map:
    """Orthogonal Procrustes, with a shift."""
    from_H, to_H = seen_TH.mean(dim=0), clean_TH.mean(dim=0)
    left, _, right = torch.linalg.svd((seen_TH - from_H).double().T @ (clean_TH - to_H).double())
    turn_HH = (left @ right).float()
    return lambda rows: (rows - from_H) @ turn_HH + to_H


def _least_squares(seen_TH: torch.Tensor, clean_TH: torch.Tensor, shrinkage: float) -> Map:
    """The affine map of least squares, shrunk towards the identity."""
    from_H, to_H = seen_TH.mean(dim=0), clean_TH.mean(dim=0)
    x, y = (seen_TH - from_H).double(), (clean_TH - to_H).double()
    gram = x.T @ x
    ridge = shrinkage * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    change_HH = torch.linalg.solve(gram + ridge, x.T @ (y - x)).float()
    return lambda rows: (rows - from_H) + (rows - from_H) @ change_HH + to_H


def _whitening(errors_TH: torch.Tensor) -> torch.Tensor:
    """The inverse root of the errors' second moment, shrunk towards a multiple of the identity."""
    errors = errors_TH.double()
    rows, width = errors.shape
    moment_HH = errors.T @ errors / rows
    mean = moment_HH.diagonal().mean().clamp_min(1e-12)
    weight = min(1.0, width / (rows + width))
    moment_HH = (1 - weight) * moment_HH + weight * mean * torch.eye(width, dtype=errors.dtype)
    values, vectors = torch.linalg.eigh(moment_HH)
    root_HH: torch.Tensor = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T
    return root_HH.float()


def align(attacker: Attacker, known: Sequence[Target]) -> tuple[Map, torch.Tensor | None]:
    """The map from what is seen to what the public weights compute.

    Returns:
        The map, and the whitening [H, H] of what it leaves on known texts that were left out: directions in which it
        errs count less. None without known texts.
    """
    if len(known) < 2:
        return (lambda rows: rows), None
    cut = max(1, len(known) * 3 // 4)
    fitted, held = _rows(attacker, known[:cut]), _rows(attacker, known[cut:])

    def makers() -> list[Callable[[torch.Tensor, torch.Tensor], Map]]:
        squares = [lambda s, c, a=a: _least_squares(s, c, a) for a in _SHRINKAGE]
        return [lambda s, c: lambda rows: rows, _rotation, *squares]  # noqa: ARG005

    left = [make(*fitted)(held[0]) - held[1] for make in makers()]
    best = min(range(len(left)), key=lambda number: float(left[number].square().mean()))
    return makers()[best](*_rows(attacker, known)), _whitening(left[best])


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Recover every target from its first pass alone, with the map undone."""
    undo, metric_HH = align(attacker, attacker.known)
    seen = []
    for target in targets:
        once = seen_once(attacker, target)
        variance_T = once.variance_T
        if metric_HH is not None:  # what is left on the known texts holds the noise and the rounding too
            variance_T = torch.ones_like(variance_T)
        seen.append(replace(once, rows_TH=undo(once.rows_TH), variance_T=variance_T, metric_HH=metric_HH))
    truths = [target.ids_T for target in targets]
    return search(attacker, seen, truths, beam=attacker.beam, prior=True, progress=progress)
