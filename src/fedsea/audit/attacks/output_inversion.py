"""Labels from an update of a client's output side: the mathematics of attack A7 behind the trunk.

The server has the inputs of these parameters, which are its own outputs (whatever noise there was on what it computed
them from), and the parameters, which were sent to it. All that it lacks of the client's gradient is the labels:

    gradient = J^T (P - Y)

with J the Jacobian of the logits by the parameters, P their softmax, and Y one-hot. The rows of a head that is trained
in full are pulled up by the final hidden states of their labels, and down by all; that names them at once. Other
parameters (LoRA of the output blocks) are matched: Y is searched by descent, of which each step takes one product with
J^T (a backward pass) and one with J (a difference of logits). This is gradient matching (DLG, arXiv 1906.08935) made
easy, since the gradient is linear in Y.

N  rows that carry loss, V  vocabulary size, H  hidden size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from fedsea.audit.attacks.update_inversion import NOTHING, SpanFindings
from fedsea.audit.targets import Progress, unheard
from fedsea.model import adapters
from fedsea.model.layout import unit_of
from fedsea.model.segments import OutputBlocks

Tensors = Mapping[str, torch.Tensor]

_COUNTED = 0.5
"""Least estimate of how often a label occurs."""
_SIGMAS = 4.0
"""By which the estimate has to be above the update's own noise."""
_AGREES = 0.4
"""Least mean agreement of signs between a row's change and a final hidden state; by chance it is about 1 / sqrt(H)."""
_DESCENT = 40
_MOMENTUM = 0.8
_FIRST_STEP = 12.0
"""Of the descent, in logits."""
_EXPLAINED = 1e-5
"""Share of the gradient's square that may be left."""


def name_labels(
    blocks: OutputBlocks,
    pulls: Tensors,
    output_TH: torch.Tensor,
    lengths: Sequence[int],
    *,
    gradient: bool,
    noise_std: float = 0.0,
    progress: Progress = unheard,
) -> SpanFindings:
    """Labels behind an update of the output side, or behind the sum of several clients' with the same parameters.

    Args:
        blocks: As they were when the update was made; they are used, and left as they were.
        pulls: By portable name, what the update adds: the difference, or the gradient's negative.
        output_TH: The trunk's outputs for all sequences of the update, end to end.
        lengths: Rows of each; the last of each carries no loss.
        gradient: Whether it is a gradient; else a difference after the optimizer, of which the signs tell most.
        noise_std: Of the noise on every value of the update.
        progress: Told of the descent's steps.
    """
    parameters = adapters.trainable(blocks)
    if not parameters or not parameters.keys() <= pulls.keys():
        return NOTHING
    known = _Known(blocks, output_TH, lengths)
    with _evaluating(blocks):
        heads = [name for name in parameters if unit_of(name) == "head" and name.endswith(".weight")]
        heads = [name for name in heads if parameters[name].dim() == 2 and ".lora_" not in name]
        if heads and gradient:
            return _counted(known, pulls[heads[0]], noise_std)
        if heads:
            return _agreeing(known, pulls[heads[0]])
        labels_N, explained = known.matched({name: pulls[name] for name in parameters}, gradient, progress)
    found = tuple(dict.fromkeys(labels_N.tolist()))
    return SpanFindings(found, len(labels_N), len(labels_N), "matching", explained)


@contextlib.contextmanager
def _evaluating(blocks: OutputBlocks) -> Iterator[None]:
    """Without dropout."""
    before = blocks.model.training
    blocks.model.train(False)
    try:
        yield
    finally:
        blocks.model.train(before)


class _Known:
    """The client's output side as the server can run it.

    Args:
        blocks: See `name_labels`, as are the others.
        output_TH: The trunk's outputs.
        lengths: Rows of each sequence.
    """

    def __init__(self, blocks: OutputBlocks, output_TH: torch.Tensor, lengths: Sequence[int]) -> None:
        self._blocks, self._output_TH = blocks, output_TH.detach()
        self._lengths = tuple(lengths)
        kept = [row < length - 1 for length in lengths for row in range(length)]
        self._kept_T = torch.tensor(kept, device=output_TH.device)

    def final(self) -> torch.Tensor:
        """Final hidden states [N, H]."""
        return self._blocks.final(self._output_TH, self._lengths)[self._kept_T]

    def logits(self) -> torch.Tensor:
        """[N, V]."""
        return self._blocks.logits(self.final()).float()

    def matched(self, pulls: Tensors, gradient: bool, progress: Progress) -> tuple[torch.Tensor, bool]:
        """Labels [N] with which the gradient is as it was received, and whether it is then explained."""
        with torch.no_grad():
            scores_NV = torch.log_softmax(self.logits(), dim=-1)
        start_NV = scores_NV.exp()
        if not gradient:  # no gradient to be matched: the labels that the change favours most
            return self._along(pulls).argmax(dim=1), False
        whole = max(_square(pulls), 1e-30)
        guess_NV, moved_NV, step = start_NV, torch.zeros_like(scores_NV), 0.0
        for number in range(_DESCENT):
            progress(number, _DESCENT)
            back = self._back(guess_NV - start_NV)
            left = {name: pull.to(back[name]) - back[name] for name, pull in pulls.items()}
            if _square(left) < _EXPLAINED * whole:
                return guess_NV.argmax(dim=1), True
            slope_NV = self._along(left)
            step = step or _FIRST_STEP / max(float(slope_NV.abs().amax(dim=1).mean()), 1e-30)
            moved_NV = _MOMENTUM * moved_NV + step * slope_NV
            scores_NV = scores_NV + moved_NV
            guess_NV = torch.softmax(scores_NV, dim=-1)
        return guess_NV.argmax(dim=1), False

    def _back(self, weights_NV: torch.Tensor) -> dict[str, torch.Tensor]:
        """J^T times weights."""
        parameters = adapters.trainable(self._blocks)
        with torch.enable_grad():
            total = (self.logits() * weights_NV).sum()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    @torch.no_grad()
    def _along(self, direction: Tensors) -> torch.Tensor:
        """J times a direction of the parameters, as a difference of logits on both sides."""
        parameters = adapters.trainable(self._blocks)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        width = 1e-3 * max(_square(before) ** 0.5, 1.0) / max(_square(direction) ** 0.5, 1e-30)
        sides = []
        try:
            for sign in (1.0, -1.0):
                for name, parameter in parameters.items():
                    parameter.copy_(before[name] + sign * width * direction[name].to(parameter))
                sides.append(self.logits())
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        slope_NV: torch.Tensor = (sides[0] - sides[1]) / (2 * width)
        return slope_NV


def _square(tensors: Tensors) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


@torch.no_grad()
def _counted(known: _Known, pull_VH: torch.Tensor, noise_std: float) -> SpanFindings:
    """Labels by how often each occurs.

    Along a direction in which all final hidden states are 1, a row's gradient is the probability that it got, less its
    count.
    """
    final_NH = known.final().double()
    gram_HH = final_NH.T @ final_NH
    ridge_HH = 1e-6 * gram_HH.diagonal().mean() * torch.eye(len(gram_HH), dtype=gram_HH.dtype, device=gram_HH.device)
    even_H = torch.linalg.solve(gram_HH + ridge_HH, final_NH.sum(dim=0))
    expected_V = torch.softmax(known.logits(), dim=-1).double().sum(dim=0)
    count_V = pull_VH.to(final_NH) @ even_H + expected_V
    least = max(_COUNTED, _SIGMAS * noise_std * float(even_H.norm()))
    exact = float((final_NH @ even_H - 1.0).abs().max()) < 1e-3 and noise_std == 0.0
    return _named(count_V, least, len(final_NH), "counts", exact)


@torch.no_grad()
def _agreeing(known: _Known, pull_VH: torch.Tensor) -> SpanFindings:
    """Labels whose rows moved along a final hidden state: the optimizer leaves of a gradient little but its signs."""
    signs_NH = known.final().float().sign()
    agree_V = (pull_VH.to(signs_NH).sign() @ signs_NH.T).amax(dim=1) / signs_NH.shape[1]
    return _named(agree_V, max(_AGREES, _SIGMAS / signs_NH.shape[1] ** 0.5), len(signs_NH), "signs", False)


def _named(score_V: torch.Tensor, least: float, rows: int, method: str, exact: bool) -> SpanFindings:
    order_V = score_V.argsort(descending=True)
    return SpanFindings(tuple(order_V[: int((score_V > least).sum())].tolist()), rows, rows, method, exact)
