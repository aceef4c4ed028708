"""The tables of the plan, key by key. Docstrings of the keys are the reference page's text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator

from fedsea.types import Channel, Partition

CodecName = Literal["fp32", "bf16", "fp16", "int8"]
DtypeName = Literal["float32", "bfloat16", "float16"]
SegmentTraining = Literal["adapter", "full", "frozen"]
Whole = Annotated[int, Field(strict=True)]
"""A whole number: no truth value, text or 1.0."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number, whole or not: no truth value and no text."""
Flag = Annotated[bool, Field(strict=True)]
ClientName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


MOST_BLOCKS = 10_000
MOST_ROUNDS = 10_000_000
"""Also of a round's steps: a run's steps are told in 64 bits."""
MOST_AT_ONCE = 65_536
"""Of ranks, micro-batches and their sequences; more is a slip of the keyboard, for which no memory would suffice."""
MOST_TOKENS = 2**24
MOST_MB = 2**20
MOST_S = 10_000_000
"""Longest time that anybody waits: four months."""


def either(sentence: str) -> WrapValidator:
    """Of a field that takes one of several things: one sentence, where pydantic has one for each of them."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(validate)


class Section(BaseModel):
    """A table: what is in it is fixed, and other keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The base model.

    Attributes:
        path: Local folder or hub id; a client may point to its own copy, the fingerprint decides.
        revision: Hub revision; ignored for a local folder.
        dtype: Type of the frozen weights. Trained parameters are always float32.
        autocast: "bfloat16" runs the blocks under bf16 autocast; "none" computes in `dtype`.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        fingerprint: Unit ("config", "embedding", "block.3", "norm", "head") to SHA-256; the server fills it in.
    """

    path: str
    revision: str = "main"
    dtype: DtypeName = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    activation_checkpointing: Flag = False
    fingerprint: dict[str, str] = {}


class PartitionSection(Section):
    """Default cut; a client may have another one in its `[[clients]]` entry.

    Attributes:
        input_blocks: Blocks behind the embedding that stay at the client.
        output_blocks: Blocks before the final norm and head that stay at the client.
    """

    input_blocks: Whole = Field(1, ge=0, le=MOST_BLOCKS)
    output_blocks: Whole = Field(1, ge=0, le=MOST_BLOCKS)

    def partition(self) -> Partition:
        """As the type that `model` takes."""
        return Partition(self.input_blocks, self.output_blocks)


class AdapterSection(Section):
    """LoRA, and what is trained in each segment.

    Attributes:
        rank: Rank of the LoRA factors.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on LoRA's input, in training.
        targets: Module names as in peft's `target_modules`, or "all-linear" (every linear layer of the blocks). Experts
            that are stored as one tensor are not adapted, nor are layers whose names peft takes for theirs. With the
            head's name, usually "lm_head", the output segment is trained whatever its blocks.
        input: Training of the client's input segment: "adapter", "full" or "frozen".
        trunk: Training of the server's trunk: "adapter" or "frozen".
        output: Training of the client's output segment.
    """

    rank: Whole = Field(8, ge=1, le=MOST_AT_ONCE)
    alpha: Real = Field(16.0, gt=0)
    dropout: Real = Field(0.0, ge=0, lt=1)
    targets: Annotated[
        Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | Literal["all-linear"],
        either('give "all-linear", or a list of one or more module names'),
    ] = "all-linear"
    input: SegmentTraining = "adapter"
    trunk: Literal["adapter", "frozen"] = "adapter"
    output: SegmentTraining = "adapter"


class OptimizerSection(Section):
    """AdamW, its schedule, and gradient clipping.

    Attributes:
        learning_rate: Peak rate, for all segments.
        betas: AdamW's decay of the two moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decay; acts on all trained parameters.
        max_norm: Largest gradient norm; 0 switches clipping off.
        clip_scope: "segment" clips every segment by its own norm; "global" by the norm over all segments of the step.
        schedule: Shape after warm-up, over all steps of the run.
        warmup_steps: Steps over which the rate rises from 0 to its peak.
    """

    learning_rate: Real = Field(1e-3, gt=0)
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Real = Field(1e-8, gt=0)
    weight_decay: Real = Field(0.0, ge=0)
    max_norm: Real = Field(1.0, ge=0)
    clip_scope: Literal["segment", "global"] = "global"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Whole = Field(0, ge=0, le=MOST_ROUNDS)


class TrainingSection(Section):
    """How steps are made.

    Attributes:
        mode: "sequential": clients take turns; "batched": their micro-batches run as one batch, one step for all.
        rounds: Rounds of the run.
        steps_per_round: Steps of a round in "batched"; steps of every client's turn in "sequential".
        micro_batches: Micro-batches that a client accumulates in a step.
        micro_batch_sequences: Sequences of a micro-batch.
        in_flight: Micro-batches that a client has under way at once, to hide the latency of the link.
        max_batch_tokens: Most tokens that the trunk runs as one batch; a larger union is run in several.
        wait: In "batched": "all" waits for every client of the plan in every step; a number is how many seconds
            a step waits for stragglers after its first client is there; they join the next step.
        min_clients: With a number in `wait`: clients that must be there before a step begins.
    """

    mode: Literal["sequential", "batched"] = "batched"
    rounds: Whole = Field(1, ge=1, le=MOST_ROUNDS)
    steps_per_round: Whole = Field(100, ge=1, le=MOST_ROUNDS)
    micro_batches: Whole = Field(1, ge=1, le=MOST_AT_ONCE)
    micro_batch_sequences: Whole = Field(8, ge=1, le=MOST_AT_ONCE)
    in_flight: Whole = Field(2, ge=1, le=MOST_AT_ONCE)
    max_batch_tokens: Whole = Field(16384, ge=1, le=MOST_TOKENS)
    wait: Annotated[
        Literal["all"] | Annotated[Real, Field(gt=0, le=MOST_S)],
        either(f'give "all", or a number of seconds above 0 and at most {MOST_S}'),
    ] = "all"
    min_clients: Whole = Field(1, ge=1, le=MOST_AT_ONCE)


class AggregationSection(Section):
    """What happens to the trained parameters of the clients' segments.

    Attributes:
        sync: "round": averaged at the end of every round; "step": gradients are summed in every step, which
            equals central training exactly; "personal": they stay at their client.
        method: How "round" averages. Each LoRA factor is averaged by itself, which is not the average of the products.
            "median" and "trimmed_mean" need three clients, and do not weigh by tokens.
        trim_fraction: Share cut off at each end by "trimmed_mean": enough for one client of the plan, and never none
            where three or more take part in a round.
        secure: The server learns only the sum of the clients' parameters, by masks that cancel; needs "round" and
            "mean".
        secure_threshold: Clients that must stay to the end of a secure round; 0 is the smallest two-thirds majority.
        secure_min: Fewest clients of any sum that is revealed.
        secure_failure: What follows when a secure round fails again and again: "stop" ends the run, "skip" goes on
            without averaging that round.
    """

    sync: Literal["round", "step", "personal"] = "round"
    method: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim_fraction: Real = Field(0.1, ge=0, lt=0.5)
    secure: Flag = False
    secure_threshold: Whole = Field(0, ge=0, le=MOST_AT_ONCE)
    secure_min: Whole = Field(2, ge=2, le=MOST_AT_ONCE)
    secure_failure: Literal["stop", "skip"] = "stop"


class DataSection(Section):
    """What the clients agree on about their text.

    Attributes:
        max_tokens: Longest sequence; longer plain text is cut into pieces, other formats are truncated at the end. A
            model with a table of positions, or whose rotary frequencies depend on the length, sets a bound.
        loss_on: "completion" takes no loss on prompts; "all" takes it everywhere.
        holdout: Share of each silo kept for validation.
    """

    max_tokens: Whole = Field(512, ge=2, le=MOST_TOKENS)
    loss_on: Literal["completion", "all"] = "completion"
    holdout: Real = Field(0.1, ge=0, lt=1)


class WireSection(Section):
    """Codecs of the two channels, the largest tensor that a peer may announce, and sealing.

    Attributes:
        hidden: Codec of hidden states, in both directions; "int8" has a scale per token.
        gradient: Codec of gradients, in both directions.
        max_tensor_mb: Largest tensor, in MiB as float32; a larger announcement ends the connection.
        sealed: Seal every payload between client and server on top of TLS. What goes through a relay where TLS ends is
            sealed whatever this says.
    """

    hidden: CodecName = "fp32"
    gradient: CodecName = "fp32"
    max_tensor_mb: Whole = Field(256, ge=1, le=MOST_MB)
    sealed: Flag = False


class InferenceSection(Section):
    """Decoding with the trained model, during the run and after it.

    Attributes:
        enabled: Whether the server opens sessions at all.
        max_tokens: Longest sequence, prompt and answer together; the model may set a lower bound.
        kv_memory_mb: Memory of the server for keys and values, in MiB; a session that does not fit waits in a line, or
            is refused. Every client is sure of an even share, and may have more while others leave it idle.
        max_sequences: Sequences that one client may have open at once.
        lease_s: A session without a message for so long ends.
        prefill_tokens: Most new tokens of a message; longer prompts travel, and run, in several.
        batch_tokens: Most new tokens that the server runs as one batch.
    """

    enabled: Flag = True
    max_tokens: Whole = Field(4096, ge=2, le=MOST_TOKENS)
    kv_memory_mb: Whole = Field(1024, ge=1, le=MOST_MB)
    max_sequences: Whole = Field(64, ge=1, le=4096)
    lease_s: Real = Field(300.0, ge=1, le=MOST_S)
    prefill_tokens: Whole = Field(256, ge=1, le=MOST_TOKENS)
    batch_tokens: Whole = Field(512, ge=1, le=MOST_TOKENS)

    @property
    def most_rows(self) -> int:
        """Most hidden states of one message: a prefill's, or some drafts for each of a client's sequences."""
        return max(self.prefill_tokens, 16 * self.max_sequences)


class TrustSection(Section):
    """What the federation relies on; said at every start.

    Attributes:
        mode: "trusted-server": connections are encrypted, but the server can reconstruct the clients' text; "noised":
            the clients add the noise of the table [noise], and the server may still be able to.
    """

    mode: Literal["trusted-server", "noised"] = "trusted-server"


SMALLEST, LARGEST = 1e-12, 1e12
"""Noise and clips beyond would vanish in float32, or overflow it, where they meet the values."""

MAGNITUDES = tuple(f"{channel}_{key}" for channel in Channel for key in ("std", "clip"))
"""Keys of the standard deviations and clips."""


def computable(value: float | None) -> float | None:
    """Refuse a standard deviation or clip that float32 cannot hold; 0 and None mean that there is none.

    Raises:
        ValueError: Says which are possible.
    """
    if value and not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{value:g} is out of range; give {SMALLEST:g} to {LARGEST:g}")
    return value


class NoiseSection(Section):
    """Gaussian noise on what leaves the clients, with trust.mode = "noised". Clients may be stricter, never laxer.

    Standard deviations and clips are absolute, and fixed in advance: what is scaled to the data protects nothing that
    can be accounted for. With a clip, sensitivity and so (epsilon, delta) are known, and the ledger keeps count; with a
    standard deviation alone it is the noise of the papers, for which nothing can be claimed.

    Attributes:
        hidden_std: Standard deviation of the noise on every value of the hidden states; 0: none.
        gradient_std: The same for gradients at the trunk's output.
        update_std: The same for parameters or their gradients that leave for aggregation.
        hidden_clip: L2 bound of hidden states: of each token's row, or of all rows of a sequence, as `unit` says; 0: no
            clip, so nothing can be claimed.
        gradient_clip: The same for gradients.
        update_clip: L2 bound of a whole update.
        unit: What a claim is about: one "token" (only without input blocks, and if no gradients leave), one "sequence",
            or one "document", which may give several sequences.
        delta: Of (epsilon, delta).
        epsilon: Budget of each client: what would pass it is not sent, and the run stops; 0: no budget.
    """

    hidden_std: Real = Field(0.0, ge=0)
    gradient_std: Real = Field(0.0, ge=0)
    update_std: Real = Field(0.0, ge=0)
    hidden_clip: Real = Field(0.0, ge=0)
    gradient_clip: Real = Field(0.0, ge=0)
    update_clip: Real = Field(0.0, ge=0)
    unit: Literal["token", "sequence", "document"] = "sequence"
    delta: Real = Field(1e-5, gt=0, lt=1)
    epsilon: Real = Field(0.0, ge=0)

    _computable = field_validator(*MAGNITUDES)(computable)

    def std(self, channel: Channel) -> float:
        """Standard deviation of a channel."""
        return float(getattr(self, f"{channel}_std"))

    def clip(self, channel: Channel) -> float:
        """L2 bound of a channel."""
        return float(getattr(self, f"{channel}_clip"))


class DurabilitySection(Section):
    """What is kept on disk, and what of the server's state clients may have.

    Attributes:
        keep: Newest checkpoints that stay, on both sides.
        share_trunk: Whether clients may fetch the trunk's trained parameters, for `fedsea export`.
    """

    keep: Whole = Field(2, ge=2, le=MOST_AT_ONCE)
    share_trunk: Flag = True


class ClientEntry(Section):
    """A client of the federation. A key that is left out has the plan's value.

    Attributes:
        name: Common name of its certificate: lower-case letters, digits, dots, dashes, underscores; at most 63.
        input_blocks: Its own cut.
        output_blocks: Its own cut.
        micro_batch_sequences: Its own size of a micro-batch.
        micro_batches: Its own number of micro-batches in a step.
    """

    name: ClientName
    input_blocks: Whole | None = Field(None, ge=0, le=MOST_BLOCKS)
    output_blocks: Whole | None = Field(None, ge=0, le=MOST_BLOCKS)
    micro_batch_sequences: Whole | None = Field(None, ge=1, le=MOST_AT_ONCE)
    micro_batches: Whole | None = Field(None, ge=1, le=MOST_AT_ONCE)
