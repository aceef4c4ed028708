"""What a peer may announce. Everything here is checked against a message's header before memory is allocated for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsea.types import Channel

CHUNK_BYTES = 256 << 10
"""Size of the pieces in which a message travels; one gRPC message each."""

MAX_CHUNK_BYTES = 512 << 10
"""Largest piece that is read; gRPC itself ends a stream that brings a larger one."""

MAX_HEADER_BYTES = 64 << 10
"""Largest protobuf header."""

MAX_PLAN_BYTES = 4 << 20
"""Largest plan in a `Welcome`."""

MAX_MESSAGE_CHARACTERS = 4096
"""Longest sentence of a `Failure`."""

MAX_COUNT = 2**53
"""Bound of step numbers and counts: exact in a double, far beyond any run."""


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds of the messages that a peer may send; the handshake's end replaces them by the plan's.

    The defaults are those before the handshake: no message with a tensor passes.

    Attributes:
        hidden_size: Columns of every hidden state and gradient; None refuses them all.
        max_tokens: Most rows of one hidden state or gradient.
        max_sequences: Most sequences of one micro-batch.
        max_tensor_bytes: Largest single tensor, as float32.
        codecs: The codec agreed on for hidden states and for gradients; bundles of parameters are always fp32.
        bundle_shapes: Exact shape of every named tensor that may arrive in a bundle.
        num_blocks: Blocks of the full model.
        masked_shapes: Like `bundle_shapes`, of bundles of masked integers; empty refuses them.
    """

    hidden_size: int | None = None
    max_tokens: int = 0
    max_sequences: int = 0
    max_tensor_bytes: int = 0
    codecs: Mapping[Channel, str] = field(default_factory=dict)
    bundle_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_blocks: int = 0
    masked_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


HANDSHAKE = WireLimits()
"""Limits until the plan is agreed on."""
