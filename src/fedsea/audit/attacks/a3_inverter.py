"""A3, a learned inverter: a small transformer from what the server sees to tokens, trained on public text alone.

It is trained under the plan's own clip and noise, on fresh draws. What it fails to recover is no proof while it still
learns, so it says whether its loss on held-out text had stopped falling when the time was up. Searches (A1, A2) need
the public weights of the input blocks; this one would also do with their outputs.

B  texts, L  tokens of the longest, T  tokens of one text, H  hidden size, V  vocabulary size
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedsea.audit.attacker import Attacker
from fedsea.audit.attacks.a4_averaging import averaged
from fedsea.audit.targets import Progress, Recovered, Target, unheard
from fedsea.types import IGNORE, Channel

_PUBLIC_TOKENS = 40_000
"""Wanted to train on; what public text lacks is sampled from the public model, in a quarter of the time at most."""

_SAMPLED_AT_ONCE = 64
_BATCH = 16
_CHECK_EVERY = 50
_PATIENCE = 4
_IMPROVES = 0.99
_MOST_STEPS = 4000
_LEARNING_RATE = 1e-3


class Inverter(nn.Module):
    """Hidden states [B, L, H] to logits [B, L, V]; every row sees the others of its text.

    Args:
        width: H.
        vocab_size: V.
        longest: Positions.
    """

    def __init__(self, width: int, vocab_size: int, longest: int) -> None:
        super().__init__()
        inner = min(256, max(64, width))
        self.enter = nn.Linear(width, inner)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, inner))
        layer = nn.TransformerEncoderLayer(inner, 4, 4 * inner, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(inner, vocab_size)

    def forward(self, hidden_BLH: torch.Tensor, padding_BL: torch.Tensor) -> torch.Tensor:
        """Logits; `padding_BL` marks rows that are none."""
        entered = self.enter(hidden_BLH) + self.positions[: hidden_BLH.shape[1]]
        logits_BLV: torch.Tensor = self.head(self.blocks(entered, src_key_padding_mask=padding_BL))
        return logits_BLV


@dataclass(frozen=True, slots=True)
class _Scale:
    """What brings rows to mean 0 and variance 1."""

    mean_H: torch.Tensor
    std: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - self.mean_H) / self.std


@dataclass(frozen=True, slots=True)
class _Trained:
    model: Inverter
    scale: _Scale
    note: str
    cut_short: bool


def run(attacker: Attacker, targets: Sequence[Target], progress: Progress = unheard) -> list[Recovered]:
    """Train on public text under the noise that averaging over each target's passes leaves, then read the targets."""
    longest = max(len(target.observations[0].hidden_TH) for target in targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(attacker.seed)
        trained = _train(attacker, longest, sum(seen.hidden_passes for seen in targets[0].passes), progress)
    answers = []
    trained.model.eval()
    for target in targets:
        rows_TH = trained.scale(averaged(attacker, target).rows_TH)
        with torch.no_grad():
            logits_TV = trained.model(rows_TH[None], torch.zeros(1, len(rows_TH), dtype=torch.bool))[0]
        answers.append(Recovered(logits_TV.argmax(-1), note=trained.note, cut_short=trained.cut_short))
    return answers


def public_texts(attacker: Attacker, longest: int) -> list[torch.Tensor]:
    """Public text, and as much more from the public model itself as is missing and time allows."""
    until = time.monotonic() + attacker.budget_s / 4
    texts = [ids_T[:longest].long() for ids_T in attacker.public if len(ids_T) > 1]
    missing = _PUBLIC_TOKENS - sum(len(ids_T) for ids_T in texts)
    while not texts or (missing > 0 and time.monotonic() < until):
        seed = int(torch.randint(2**31, ()))  # none that other texts were made of
        texts += attacker.sampled(_SAMPLED_AT_ONCE, longest, seed)
        missing -= _SAMPLED_AT_ONCE * longest
    return texts


def _train(attacker: Attacker, longest: int, passes: float, progress: Progress) -> _Trained:
    started = time.monotonic()
    texts = public_texts(attacker, longest)
    order = torch.randperm(len(texts)).tolist()
    share = max(1, len(order) // 10)
    held, kept = order[:share], order[share:]
    sent = [attacker.clipped(ids_T).cpu() for ids_T in texts]  # the inverter learns there
    rows_TH = torch.cat([sent[i] / attacker.shrunk(len(sent[i])) for i in kept])
    variance = float(_variance(attacker, sent[kept[0]], passes).mean()) / attacker.shrunk(len(sent[kept[0]])) ** 2
    spread = float(rows_TH.var(0).mean())
    scale = _Scale(rows_TH.mean(0), max((spread + variance) ** 0.5, 1e-6))
    model = Inverter(rows_TH.shape[1], attacker.vocab_size, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)

    def loss_of(chosen: Sequence[int]) -> torch.Tensor:
        noised = [scale(_seen(attacker, sent[i], passes)) for i in chosen]
        hidden_BLH = nn.utils.rnn.pad_sequence(noised, batch_first=True)
        ids_BL = nn.utils.rnn.pad_sequence([texts[i] for i in chosen], batch_first=True, padding_value=IGNORE)
        logits_BLV = model(hidden_BLH, ids_BL == IGNORE)
        return F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten(), ignore_index=IGNORE)

    losses: list[float] = []
    converged, step = False, 0
    while step < _MOST_STEPS and time.monotonic() - started < attacker.budget_s and not converged:
        model.train()
        chosen = [kept[i] for i in torch.randint(len(kept), (_BATCH,)).tolist()]
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(chosen))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % _CHECK_EVERY == 0:
            model.eval()
            with torch.no_grad():
                losses.append(float(loss_of(held[:64])))
            converged = _stopped_falling(losses)
            progress(step, _MOST_STEPS)
    state = "stopped falling" if converged else "was still falling: not converged"
    last = f"{losses[-1]:.3f}" if losses else "not taken"
    note = f"inverter: {step} steps, held-out loss {last}, {state}"
    return _Trained(model, scale, note, cut_short=not converged and step < _MOST_STEPS)


def _variance(attacker: Attacker, rows_TH: torch.Tensor, passes: float) -> torch.Tensor:
    return attacker.row_variance(Channel.HIDDEN, rows_TH) / passes


def _seen(attacker: Attacker, sent_TH: torch.Tensor, passes: float) -> torch.Tensor:
    """What comes of a public text on the way that the targets went: clip, noise, and the clip undone (see A4)."""
    noise_TH = _variance(attacker, sent_TH, passes).sqrt()[:, None] * torch.randn_like(sent_TH)
    return (sent_TH + noise_TH) / attacker.shrunk(len(sent_TH))


def _stopped_falling(losses: Sequence[float]) -> bool:
    """Whether the last checks brought less than a hundredth; a loss near zero has nowhere to fall.

    >>> _stopped_falling([3.0, 2.0, 1.0]), _stopped_falling([1.0, 0.9, 0.9, 0.9, 0.9, 0.9]), _stopped_falling([1e-4])
    (False, True, True)
    """
    if losses and losses[-1] < 1e-3:
        return True
    return len(losses) > _PATIENCE and min(losses[-_PATIENCE:]) > _IMPROVES * min(losses[:-_PATIENCE])
