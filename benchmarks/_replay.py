"""Clients that stand for machines of their own: their passes are timed alone, then waited for instead of computed.

Eight organisations have eight machines; here their processes share a few cores, and would measure these. So a client
first computes for real, and notes the CPU time of each pass per token. From then on it waits that long, and sends rows
that it has sent before: the same number of bytes, sealed, encrypted and checked as ever. Its optimizer, its durable
state, the server and the links stay real.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch

from fedsea.client.segments import ClientSegments
from fedsea.client.trainer import Trainer


class Replay:
    """Takes the place of a client's three passes in this process; computes until `start` is called."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = defaultdict(list)
        self._waits: dict[str, float] | None = None
        self._rows_TH: dict[str, torch.Tensor] = {}
        embed, head, backward_input = ClientSegments.embed, ClientSegments.head, Trainer._backward_input

        def replayed_embed(segments: ClientSegments, batch: Any, *args: Any) -> torch.Tensor:
            if self._waits is None:
                hidden_TH = self._timed("embed", batch.num_tokens, lambda: embed(segments, batch, *args))
                self._rows_TH["embed"] = hidden_TH.detach()
                return hidden_TH
            return self._again("embed", batch.num_tokens).requires_grad_()

        def replayed_head(segments: ClientSegments, batch: Any, *args: Any) -> tuple[float, torch.Tensor | None]:
            if self._waits is None:
                loss, gradient_TH = self._timed("head", batch.num_tokens, lambda: head(segments, batch, *args))
                assert gradient_TH is not None
                self._rows_TH["head"] = gradient_TH
                return loss, gradient_TH
            return 0.0, self._again("head", batch.num_tokens)

        def replayed_backward(trainer: Trainer, hidden_TH: torch.Tensor, answer: Any) -> None:
            with trainer._timed("trunk"):
                answer.result()
            if self._waits is None:
                self._timed("backward", len(hidden_TH), lambda: backward_input(trainer, hidden_TH, answer))
                return
            with trainer._timed("input"):
                time.sleep(self._waits["backward"] * len(hidden_TH))

        ClientSegments.embed = replayed_embed  # type: ignore[method-assign]
        ClientSegments.head = replayed_head  # type: ignore[method-assign]
        Trainer._backward_input = replayed_backward  # type: ignore[method-assign]

    def seconds_per_token(self) -> dict[str, float]:
        """Medians of the CPU time so far, by pass."""
        return {name: statistics.median(values) for name, values in self._taken.items()}

    def start(self, seconds_per_token: dict[str, float]) -> None:
        """From now on wait instead of computing."""
        self._waits = seconds_per_token

    def _timed(self, name: str, num_tokens: int, run: Any) -> Any:
        start = time.thread_time()
        result = run()
        self._taken[name].append((time.thread_time() - start) / num_tokens)
        return result

    def _again(self, name: str, num_tokens: int) -> torch.Tensor:
        """Wait, then rows as once computed, repeated or cut to the number that is wanted."""
        assert self._waits is not None
        time.sleep(self._waits[name] * num_tokens)
        rows_TH = self._rows_TH[name]
        return rows_TH.repeat(-(-num_tokens // len(rows_TH)), 1)[:num_tokens].clone()
