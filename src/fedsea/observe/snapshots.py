"""How a server stands at one moment, as displays and metrics take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class InferenceSnapshot:
    """How decoding stands at one moment.

    Attributes:
        kv_bytes: Memory that sessions have set aside for keys and values.
        tokens: New tokens through the trunk since this process began, prompts' included.
        batches: In so many batches.
    """

    sessions: int
    sequences: int
    kv_bytes: int
    kv_bytes_limit: int
    tokens: int
    batches: int


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """How a server stands at one moment.

    Attributes:
        step: Steps applied.
        round: Round under way, from 0.
        waiting_for: Clients without whom the step under way does not go on.
        tokens: Target tokens that were trained on since this process began.
        bytes_up: From clients to the server.
        inference: None if the plan does not offer it.
        refused: Client to the reason why the server does not let it in, until it is back.
        using: Clients that are connected to use the model, training or not.
    """

    step: int
    num_steps: int
    round: int
    connected: tuple[str, ...]
    waiting_for: tuple[str, ...]
    tokens: int
    bytes_up: int
    bytes_down: int
    inference: InferenceSnapshot | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    using: tuple[str, ...] = ()
