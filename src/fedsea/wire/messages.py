"""The messages of the protocol, as plain dataclasses; `wire.encoding` turns them into bytes and back.

Client to server: tensors are a `Release` (made by the privacy boundary). Server to client: a `Reply`.
After decoding, either is a plain mapping of name to tensor, so both are typed `Tensors` here; a single hidden
state or gradient has the name "".

Steps count from 0 over the whole run. `attempt` counts from 0 within a step: when the server has to begin a
step again (it restarted, or a straggler was left behind) it opens the next attempt, and everything that still
arrives for an older one is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from fedsea.types import BlockRange, Release, Reply

Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Hello:
    """Client: first message. The client's name is read from its certificate, never from here."""

    protocol_version: int
    software_version: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Server: the plan, the hash of it, and the identity of the run (a client keeps state per run)."""

    plan_json: str
    plan_sha256: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Join:
    """Client: agrees to the plan and says where it stands.

    Attributes:
        plan_sha256: Hash that the client computed itself.
        next_step: First step that this client's durable state does not contain yet.
        prepared_step: The step whose gradients this client holds durably without having applied them, or -1.
        round: Rounds whose aggregation this client's durable state contains.
        role: "train" takes part in steps; "observe" only evaluates or fetches.
    """

    plan_sha256: str
    next_step: int
    prepared_step: int
    round: int
    role: str = "train"


@dataclass(frozen=True, slots=True)
class StepOpen:
    """Server: the client may send its micro-batches of this step."""

    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Forward:
    """Client: hidden states that enter the trunk.

    Attributes:
        step: Step, or a request number of the client's own when `evaluate`.
        num_micro_batches: How many micro-batches this client has in this step.
        blocks: Blocks to run.
        lengths: Tokens of each sequence in the micro-batch.
        num_target_tokens: Weight of this micro-batch in the step.
        evaluate: No gradient will follow; the server keeps nothing.
        hidden_TH: One tensor, named "".
    """

    step: int
    attempt: int
    micro_batch: int
    num_micro_batches: int
    blocks: BlockRange
    lengths: tuple[int, ...]
    num_target_tokens: int
    evaluate: bool
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class Output:
    """Server: hidden states that leave the trunk, for one `Forward`."""

    step: int
    attempt: int
    micro_batch: int
    evaluate: bool
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class Backward:
    """Client: gradient of the summed loss at the trunk's output."""

    step: int
    attempt: int
    micro_batch: int
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class InputGradient:
    """Server: gradient at the trunk's input; no tensor when the client trains nothing below the cut.

    Attributes:
        evaluate: It answers a `Pullback`, and belongs to no step.
    """

    step: int
    attempt: int
    micro_batch: int
    tensors: Release | Reply | Tensors = field(default_factory=dict)
    evaluate: bool = False


@dataclass(frozen=True, slots=True)
class Pullback:
    """Client: asks for the gradient at the trunk's input, outside any step; the trunk itself learns nothing.

    The server runs the hidden states again and keeps nothing.

    Attributes:
        step: Request number of the client's own.
        blocks: Blocks to run.
        lengths: Tokens of each sequence.
        tensors: Hidden states at the trunk's input: one tensor, named "".
        gradient: The gradient at the trunk's output, of the same shape: one tensor, named "".
    """

    step: int
    micro_batch: int
    blocks: BlockRange
    lengths: tuple[int, ...]
    tensors: Release | Reply | Tensors
    gradient: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class StepReady:
    """Client: its own gradients of the step are durable.

    Attributes:
        num_target_tokens: Target tokens of all its micro-batches.
        squared_norm: Squared norm of its gradients (of the loss averaged over its own target tokens).
        tensors: With `aggregation.sync = "step"`, the gradients of the summed loss by parameter name; else empty.
    """

    step: int
    attempt: int
    num_target_tokens: int
    squared_norm: float
    tensors: Release | Reply | Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDone:
    """Server: the step is applied and durable at the server; sent again to a client that missed it.

    Attributes:
        num_target_tokens: Target tokens of all clients of the step.
        clip_coefficient: Factor of the gradients with `clip_scope = "global"`; 1.0 when nothing is clipped.
        tensors: With `aggregation.sync = "step"`, the summed gradients that the client needs; else empty.
    """

    step: int
    num_target_tokens: int
    clip_coefficient: float
    tensors: Release | Reply | Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundOpen:
    """Server: the round's steps are done; the client sends its `RoundUpdate`, or its `SecureKeys`.

    Attributes:
        attempt: With `aggregation.secure`, counts the attempts to make the round's sum.
    """

    round: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class RoundUpdate:
    """Client: its trained parameters at the end of a round, with the target tokens it trained on in that round."""

    round: int
    num_target_tokens: int
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class RoundResult:
    """Server: the aggregate of a round, the parameters that this client holds; durable at the server."""

    round: int
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class SecureKeys:
    """Client: its keys of one attempt of a secure round; see `federation.secure.messages.Advertisement`."""

    round: int
    attempt: int
    certificate: bytes
    sharing_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SecureRoster:
    """Server: the keys of all members, one entry of each tuple a member, as they signed them."""

    round: int
    attempt: int
    names: tuple[str, ...]
    certificates: tuple[bytes, ...]
    sharing_keys: tuple[bytes, ...]
    mask_keys: tuple[bytes, ...]
    commitments: tuple[bytes, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SecureShares:
    """Client: shares of its secrets, sealed for the other members that `names` says."""

    round: int
    attempt: int
    names: tuple[str, ...]
    sealed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SecureDelivery:
    """Server: shares that the members of `names` have sealed for this client."""

    round: int
    attempt: int
    names: tuple[str, ...]
    sealed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SecureUpdate:
    """Client: its trained parameters times its weight, and the weight, as masked integers mod 2^64."""

    round: int
    attempt: int
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class SecureSurvivors:
    """Server: whose masked values are in the sum."""

    round: int
    attempt: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SecureConsent:
    """Client: its signature of the survivors."""

    round: int
    attempt: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class SecureEvidence:
    """Server: signatures of the survivors by the members of `names`."""

    round: int
    attempt: int
    names: tuple[str, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SecureReveal:
    """Client: one share for each member of `names`, which takes the masks off the sum."""

    round: int
    attempt: int
    names: tuple[str, ...]
    shares: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FetchTrunk:
    """Client: asks for the trunk's trained parameters, for an export."""


@dataclass(frozen=True, slots=True)
class TrunkState:
    """Server: the trunk's trained parameters after `next_step` steps."""

    next_step: int
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """Client: wants to decode; also sent again after a lost connection, for the session it had.

    Attributes:
        session: Number of the client's own, counted up.
        owner: Random number of the client's process; with the certificate's name it tells whose session it is.
        num_sequences: Sequences that share the session's messages.
        max_tokens: Most tokens of each sequence, prompt and answer together.
        blocks: Blocks to run.
    """

    session: int
    owner: int
    num_sequences: int
    max_tokens: int
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """Server: memory for the session is set aside.

    Attributes:
        held: Tokens of each sequence that the server has in its cache; more than 0 if it still knew the session.
        version: Step of the run after which the trunk's adapters were as this session sees them.
        lease_s: Without a message for so long, the session ends.
    """

    session: int
    held: tuple[int, ...]
    version: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class SessionForward:
    """Client: hidden states of new tokens.

    Attributes:
        number: Counts the session's messages.
        positions: Where each sequence's new tokens begin; what the server holds from there on is forgotten.
        lengths: New tokens of each sequence; 0 leaves it as it is.
        sources: For each sequence, the one whose past it takes over before anything else; empty keeps its own.
        silent: The output is not wanted: the message rebuilds a cache that was lost.
        tensors: One tensor [T, H], named "", of all sequences end to end.
    """

    session: int
    number: int
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[int, ...]
    silent: bool
    tensors: Release | Reply | Tensors


@dataclass(frozen=True, slots=True)
class SessionOutput:
    """Server: hidden states that leave the trunk, for one `SessionForward`; no tensor if that was silent."""

    session: int
    number: int
    tensors: Release | Reply | Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionClose:
    """Client: is done with a session.

    Attributes:
        session: Its number.
        owner: Of the client's process, whichever stream the session was opened on; 0 means one of this stream alone.
    """

    session: int
    owner: int = 0


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """Server: a session was not opened, or has ended; other sessions of the stream are not concerned."""

    session: int
    code: str
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """Server: why nothing happens at the moment; shown by the client's progress display."""

    step: int
    waiting_for: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Server: the run is over. Client: leaves for good."""

    next_step: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Either side: an error; `fatal` closes the stream.

    Attributes:
        code: `FedseaError.code`.
        step: Step that failed, or -1.
    """

    code: str
    message: str
    retry_after_s: float
    step: int
    fatal: bool


Message: TypeAlias = (
    Hello
    | Welcome
    | Join
    | StepOpen
    | Forward
    | Output
    | Backward
    | InputGradient
    | Pullback
    | StepReady
    | StepDone
    | RoundOpen
    | RoundUpdate
    | RoundResult
    | SecureKeys
    | SecureRoster
    | SecureShares
    | SecureDelivery
    | SecureUpdate
    | SecureSurvivors
    | SecureConsent
    | SecureEvidence
    | SecureReveal
    | FetchTrunk
    | TrunkState
    | SessionOpen
    | SessionOpened
    | SessionForward
    | SessionOutput
    | SessionClose
    | SessionFailed
    | Waiting
    | Finished
    | Failure
)
