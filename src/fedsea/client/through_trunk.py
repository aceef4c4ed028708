"""The trunk as one function of hidden states that autograd can go through, outside any step of a run.

T  tokens of all sequences end to end, H  hidden size
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fedsea.client.decoding import SplitDecoder
from fedsea.client.padding import pieces_of
from fedsea.client.trunk import MicroBatch, Sealed
from fedsea.errors import ConfigError
from fedsea.types import Origin, Purpose

_FIRST_REQUEST = 1 << 32
"""Request numbers begin here, apart from those of evaluations on the same trunk."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One message's worth of sequences, kept as the very bytes that were sent."""

    where: MicroBatch
    hidden: Sealed
    output: Future[torch.Tensor]


class ThroughTrunk:
    """Hidden states through the trunk, in as many messages as it takes, all under way at once.

    The trunk runs without dropout and learns nothing. A gradient at its input is asked for in the backward pass, if the
    plan lets this client train something below the cut; else none leaves it, whatever autograd would want.

    Args:
        decoder: Trunk, boundary and plan.
    """

    def __init__(self, decoder: SplitDecoder) -> None:
        self._decoder = decoder
        plan, segments = decoder.plan, decoder.segments
        size = segments.input_blocks.hidden_size
        most, self._most_sequences = plan.most_in_a_message(segments.name, size, decodes=True)
        self._most_tokens = most
        self._longest = min(plan.data.max_tokens, most)
        self._requests = itertools.count(_FIRST_REQUEST)

    def __call__(self, hidden_TH: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """Hidden states [T, H] at the trunk's output, float32.

        Raises:
            ConfigError: A sequence is longer than the plan allows.
            FedseaError: The trunk is lost.
        """
        if self._decoder.segments.trains_input and hidden_TH.requires_grad and torch.is_grad_enabled():
            self._check_longest(lengths)
            through: torch.Tensor = _Function.apply(hidden_TH, self, lengths)  # type: ignore[no-untyped-call]
            return through
        if max(lengths) > self._longest:
            return self._in_sessions(hidden_TH.detach(), lengths)
        return self.received(self.ask(hidden_TH.detach(), lengths, Purpose.INFERENCE)).to(hidden_TH.device)

    def _check_longest(self, lengths: Sequence[int]) -> None:
        if max(lengths) > self._longest:
            raise ConfigError(
                f"A sequence of {max(lengths)} tokens was given for training, and the plan allows {self._longest} "
                "(data.max_tokens): cut the sequences, for example with max_length of the trainer's settings."
            )

    def ask(self, hidden_TH: torch.Tensor, lengths: tuple[int, ...], purpose: Purpose) -> list[_Asked]:
        """Send hidden states."""
        decoder, asked = self._decoder, []
        pieces = pieces_of(lengths, self._most_tokens, self._most_sequences)
        for piece, part_TH in zip(pieces, torch.split(hidden_TH, [sum(piece) for piece in pieces]), strict=True):
            number = next(self._requests)
            where = MicroBatch(number, 0, 0, 1, piece, 0, decoder.segments.trunk_blocks)
            sealed = decoder.trunk.seal(decoder.boundary.hidden(part_TH, Origin(purpose, piece)))
            asked.append(_Asked(where, sealed, decoder.trunk.evaluate(where, sealed)))
        return asked

    @staticmethod
    def received(asked: Sequence[_Asked]) -> torch.Tensor:
        """Wait for what comes back."""
        return torch.cat([one.output.result() for one in asked])

    def pull_back(self, asked: Sequence[_Asked], gradient_TH: torch.Tensor) -> torch.Tensor:
        """Gradient [T, H] at the trunk's input."""
        decoder = self._decoder
        parts = torch.split(gradient_TH, [sum(one.where.lengths) for one in asked])
        futures = [
            decoder.trunk.pull_back(
                one.where,
                one.hidden,
                decoder.trunk.seal(decoder.boundary.gradient(part_TH, Origin(Purpose.TRAINING, one.where.lengths))),
            )
            for one, part_TH in zip(asked, parts, strict=True)
        ]
        return torch.cat([future.result() for future in futures])

    def _in_sessions(self, hidden_TH: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """Sequences that no message of training could hold: each through a decoding session, as a prompt would go."""
        decoder, outputs = self._decoder, []
        inference = decoder.plan.inference
        if not inference.enabled or max(lengths) > decoder.max_tokens:
            raise ConfigError(
                f"A sequence has {max(lengths)} tokens; the plan allows {self._longest} in a batch (data.max_tokens) "
                f"and {decoder.max_tokens if inference.enabled else 0} in a session (inference.max_tokens)."
            )
        for part_TH in torch.split(hidden_TH, list(lengths)):
            session = decoder.trunk.open_session(len(part_TH))
            try:
                futures, done = [], 0
                for piece_TH in torch.split(part_TH, inference.prefill_tokens):
                    origin = Origin(Purpose.INFERENCE, (len(piece_TH),), most_rows=len(part_TH), turns=int(done == 0))
                    sealed = decoder.trunk.seal(decoder.boundary.hidden(piece_TH, origin))
                    futures.append(session.extend(sealed, (done,), (len(piece_TH),)))
                    done += len(piece_TH)
                outputs += [future.result() for future in futures]
            finally:
                session.close()
        return torch.cat(outputs).to(hidden_TH.device)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, through: ThroughTrunk, lengths: tuple[int, ...]) -> torch.Tensor:
        ctx.through, ctx.dtype = through, hidden_TH.dtype
        ctx.asked = through.ask(hidden_TH, lengths, Purpose.TRAINING)
        return through.received(ctx.asked).to(hidden_TH.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_TH,) = gradients
        pulled_TH = ctx.through.pull_back(ctx.asked, gradient_TH)
        return pulled_TH.to(device=gradient_TH.device, dtype=ctx.dtype), None, None
