"""What the attacker has: the server, with the public base model and the plan.

Nothing of the client's own, but for what was sent to the server: see `audit.knowing`.

S  sequences, C  candidates, T  tokens, H  hidden size, V  vocabulary size
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fedsea.audit.targets import Progress, Target, unheard
from fedsea.model.branching import Branches
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.segments import InputBlocks, OutputBlocks, Trunk
from fedsea.plan import FederationPlan
from fedsea.privacy.clip import clip_rows, clip_sequences
from fedsea.types import Channel, Partition
from fedsea.wire.codecs import rounded_away

_PROFILED, _PROFILED_TOKENS = 24, 64
"""Texts, and their length, that show how large rows are."""

Part = TypeVar("Part", InputBlocks, Trunk, OutputBlocks)


class BaseModel:
    """The public model, cut as one client cuts it, without any adapter.

    Args:
        checkpoint: The public weights.
        partition: The cut.
        device: Where the attacks run.
    """

    def __init__(self, checkpoint: Checkpoint, partition: Partition, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.partition = partition
        self.device = torch.device(device)

    @functools.cached_property
    def input_blocks(self) -> InputBlocks:
        """The client's input blocks as the public weights have them."""
        return self._load(load_input_blocks, self.partition)

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The server's own blocks."""
        blocks = self.partition.trunk(self.checkpoint.num_blocks)
        return self._load(load_trunk, blocks)

    @functools.cached_property
    def output_blocks(self) -> OutputBlocks:
        """The client's output blocks as the public weights have them."""
        return self._load(load_output_blocks, self.partition)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.checkpoint.config.get_text_config(decoder=True).vocab_size)

    def _load(self, load: Callable[..., Part], where: object) -> Part:
        with torch.inference_mode(False):  # whoever asks first may be a search; gradients are taken through it later
            segment = load(self.checkpoint, where, dtype=torch.float32, device=self.device)
        segment.model.requires_grad_(False)
        return segment


class Reader:
    """The public model reading several hypotheses of one length: log-probabilities of what comes next.

    Args:
        base: The public model.
        num: S.
    """

    def __init__(self, base: BaseModel, num: int) -> None:
        self._parts = [Branches(part, num) for part in (base.input_blocks, base.trunk, base.output_blocks)]
        self._output = base.output_blocks

    @torch.inference_mode()
    def take(self, ids_S: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [S, V] of the token after these."""
        values = ids_S
        for part in self._parts:
            values = part.take(values)
        return torch.log_softmax(self._output.logits(values).float(), dim=-1)

    def select(self, rows_S: torch.Tensor) -> None:
        """See `Branches.select`."""
        for part in self._parts:
            part.select(rows_S)


@dataclass
class Attacker:
    """What the server knows and wants.

    Attributes:
        base: The public model, or one with what was sent.
        plan: The federation's plan: partition, codecs and noise are in it.
        noise_std: Channel to standard deviation of the noise on every value, as the plan says.
        codecs: Channel to codec.
        beginning: Ids that every sequence begins with.
        known: Sequences of which the attacker knows the text (planted, or public), for alignment.
        public: Public texts as ids, to train on; never the targets.
        beam: Hypotheses of a sequence that a search keeps.
        seed: Of everything that an attack draws.
        most_rows: Candidate rows that a search runs as one batch; memory for many more is asked of the system in every
            layer, and given back.
        budget_s: Seconds that one attack should stay under; learned attacks read it.
        num_clients: Of the federation; 0: as many as `plan` has, which may be cut to the one that is attacked.
    """

    base: BaseModel
    plan: FederationPlan
    noise_std: dict[Channel, float] = field(default_factory=dict)
    codecs: dict[Channel, str] = field(default_factory=dict)
    beginning: tuple[int, ...] = ()
    known: Sequence[Target] = ()
    public: Sequence[torch.Tensor] = ()
    beam: int = 8
    seed: int = 0
    most_rows: int = 4096
    budget_s: float = 60.0
    num_clients: int = 0

    @property
    def input_blocks(self) -> InputBlocks:
        """See `BaseModel`."""
        return self.base.input_blocks

    @property
    def trunk(self) -> Trunk:
        """See `BaseModel`."""
        return self.base.trunk

    @property
    def output_blocks(self) -> OutputBlocks:
        """See `BaseModel`."""
        return self.base.output_blocks

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.base.vocab_size

    def noise_key(self, *purpose: object) -> bytes:
        """Key of the noise on what an attack makes itself: the same seed gives the same, no two purposes share it."""
        return hashlib.sha256(repr(("fedsea audit attack", self.seed, *purpose)).encode()).digest()

    def branches(self, num: int) -> Branches:
        """Hypotheses through the client's input blocks: what the server would see of them."""
        return Branches(self.input_blocks, num)

    def reader(self, num: int) -> Reader:
        """Hypotheses through the whole public model: what it expects next."""
        return Reader(self.base, num)

    @torch.inference_mode()
    def clean(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H] at the cut, of a text that the attacker knows."""
        return self.input_blocks(ids_T.long().to(self.base.device), [len(ids_T)]).float()

    def clipped(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The same [T, H], scaled by the plan's clip as the client scales what it sends whole."""
        rows_TH = self.clean(ids_T)
        if bound := self.row_bound():
            return clip_rows(rows_TH, bound)
        return clip_sequences(rows_TH, (len(rows_TH),), self._clip) if self._clip else rows_TH

    @torch.inference_mode()
    def expected(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T, V] of every position's token, given the true tokens before it; the first is uniform."""
        length = [len(ids_T)]
        hidden_TH = self.trunk(self.input_blocks(ids_T.long().to(self.base.device), length), length)
        logits_TV = self.output_blocks(hidden_TH, length).float()
        first_1V = torch.zeros_like(logits_TV[:1])
        return torch.log_softmax(torch.cat([first_1V, logits_TV[:-1]]), dim=-1).cpu()

    @torch.inference_mode()
    def sampled(self, count: int, length: int, seed: int, progress: Progress = unheard) -> list[torch.Tensor]:
        """Texts [T] that the public model writes: all the public text that an attacker needs, without any data."""
        draw = torch.Generator().manual_seed(seed)
        reader, taken = self.reader(count), []
        begins = [torch.full((count,), token) for token in self.beginning[:length]]
        expected_SV = torch.empty(0)
        for ids_S in begins or [torch.randint(self.vocab_size, (count,), generator=draw)]:
            taken.append(ids_S)
            expected_SV = reader.take(taken[-1].to(self.base.device))
        while len(taken) < length:
            taken.append(torch.multinomial(expected_SV.exp().cpu(), 1, generator=draw)[:, 0])
            expected_SV = reader.take(taken[-1].to(self.base.device))
            progress(len(taken), length)
        return list(torch.stack(taken, dim=1))

    def row_bound(self, most_rows: int = 0) -> float:
        """Norm to which the plan's clip scales every row by itself; 0 if it scales none, or all of a sequence alike.

        It hides nothing: whoever tries a candidate scales it as the client does.

        Args:
            most_rows: Of a session, in which rows leave bit by bit; 0 for a sequence that is sent whole.
        """
        if self.plan.noise.unit == "token":
            return self._clip
        return self._clip / math.sqrt(most_rows) if most_rows else 0.0

    def shrunk(self, length: int) -> float:
        """By how much the plan's clip has probably scaled all rows of a sequence that was sent whole; 1: not at all.

        A clip hides nothing by itself: its bound is in the plan, and how large rows are public texts show.
        """
        if not self._clip or self.plan.noise.unit == "token":
            return 1.0
        profile_T = self._squares
        rest = max(0, length - len(profile_T))
        squares = float(profile_T[:length].sum() + rest * profile_T[-1])
        return min(1.0, self._clip / math.sqrt(squares))

    @property
    def _clip(self) -> float:
        return self.plan.noise.clip(Channel.HIDDEN) if self.plan.trust.mode == "noised" else 0.0

    @functools.cached_property
    def _squares(self) -> torch.Tensor:
        """Mean squared norm [T] of the rows at each position, over texts that the public model writes."""
        texts = self.sampled(_PROFILED, _PROFILED_TOKENS, self.seed)
        return torch.stack([self.clean(ids_T).cpu().square().sum(dim=1) for ids_T in texts]).mean(dim=0)

    def row_variance(self, channel: Channel, rows_TH: torch.Tensor) -> torch.Tensor:
        """Variance [T] of the difference between what was observed and what the client computed.

        The plan's noise, and what its codec rounds away.
        """
        return rounded_away(self.codecs.get(channel, "fp32"), rows_TH) + self.noise_std.get(channel, 0.0) ** 2
