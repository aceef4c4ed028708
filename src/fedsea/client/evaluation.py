"""Loss over held-out batches through a trunk, with several batches in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

import torch

from fedsea.client.segments import ClientSegments
from fedsea.client.trunk import MicroBatch, Trunk
from fedsea.errors import DataError
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.types import Purpose, TokenBatch


def evaluate(
    segments: ClientSegments, trunk: Trunk, boundary: Boundary, batches: Iterable[TokenBatch], plan: FederationPlan
) -> tuple[float, int]:
    """Mean loss over batches.

    Args:
        segments: This client's segments.
        trunk: Where hidden states go.
        boundary: Maker of releases; evaluating releases hidden states as training does.
        batches: Held-out batches.
        plan: For the number of batches in flight.

    Returns:
        Nats per target token, and the number of target tokens.

    Raises:
        DataError: There is no target token.
    """
    under_way: deque[tuple[TokenBatch, Future[torch.Tensor]]] = deque()
    total, tokens = 0.0, 0

    def take() -> None:
        nonlocal total, tokens
        batch, future = under_way.popleft()
        total += segments.evaluate_head(batch, future.result())
        tokens += batch.num_target_tokens

    segments.train(False)
    for number, batch in enumerate(batches):
        hidden = segments.evaluate_embed(batch)
        where = MicroBatch(number, 0, 0, 1, batch.lengths, batch.num_target_tokens, segments.trunk_blocks)
        sealed = trunk.seal(boundary.hidden(hidden, batch.origin(Purpose.EVALUATION)))
        under_way.append((batch, trunk.evaluate(where, sealed)))
        if len(under_way) >= plan.training.in_flight:
            take()
    while under_way:
        take()
    if tokens == 0:
        raise DataError(
            "There is nothing to evaluate: the rows have no target tokens. With --all, `fedsea eval` takes all rows "
            "and not the held-out split alone (data.holdout in the plan)."
        )
    return total / tokens, tokens
