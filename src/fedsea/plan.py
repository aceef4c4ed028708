"""The federation plan: everything that both sides must agree on, in one TOML file at the server.

Clients receive the plan at the handshake; both sides compare `FederationPlan.sha256()`. A client's own
limits (`ClientLimits`) never travel: they say what this client is willing to take part in.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator, model_validator

from fedsea.errors import ConfigError
from fedsea.types import Partition

CodecName = Literal["fp32", "bf16", "fp16", "int8"]
DtypeName = Literal["float32", "bfloat16", "float16"]
SegmentTraining = Literal["adapter", "full", "frozen"]
ClientName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def _either(sentence: str) -> WrapValidator:
    """Of a field that takes one of several things: one sentence, where pydantic has one for each of them."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(validate)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
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
    activation_checkpointing: bool = False
    fingerprint: dict[str, str] = {}


class PartitionSection(_Section):
    """Default cut; a client may have another one in its `[[clients]]` entry.

    Attributes:
        input_blocks: Blocks behind the embedding that stay at the client.
        output_blocks: Blocks before the final norm and head that stay at the client.
    """

    input_blocks: int = Field(1, ge=0)
    output_blocks: int = Field(1, ge=0)

    def partition(self) -> Partition:
        """As the type that `model` takes."""
        return Partition(self.input_blocks, self.output_blocks)


class AdapterSection(_Section):
    """LoRA, and what is trained in each segment.

    Attributes:
        rank: Rank of the LoRA factors.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on LoRA's input, in training.
        targets: Module names as in peft's `target_modules`, or "all-linear" (every linear layer of the blocks).
        input: Training of the client's input segment: "adapter", "full" or "frozen".
        trunk: Training of the server's trunk: "adapter" or "frozen".
        output: Training of the client's output segment.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Annotated[
        tuple[str, ...] | Literal["all-linear"], _either('give "all-linear", or a list of module names')
    ] = "all-linear"
    input: SegmentTraining = "adapter"
    trunk: Literal["adapter", "frozen"] = "adapter"
    output: SegmentTraining = "adapter"


class OptimizerSection(_Section):
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

    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_norm: float = Field(1.0, ge=0)
    clip_scope: Literal["segment", "global"] = "global"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)


class TrainingSection(_Section):
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
    rounds: int = Field(1, ge=1)
    steps_per_round: int = Field(100, ge=1)
    micro_batches: int = Field(1, ge=1)
    micro_batch_sequences: int = Field(8, ge=1)
    in_flight: int = Field(2, ge=1)
    max_batch_tokens: int = Field(16384, ge=1)
    wait: Annotated[
        Literal["all"] | Annotated[float, Field(gt=0)], _either('give "all", or a number of seconds above 0')
    ] = "all"
    min_clients: int = Field(1, ge=1)


class AggregationSection(_Section):
    """What happens to the trained parameters of the clients' segments.

    Attributes:
        sync: "round": averaged at the end of every round; "step": gradients are summed in every step, which
            equals central training exactly; "personal": they stay at their client.
        method: How "round" averages. Each LoRA factor is averaged by itself, which is not the average of the products.
        trim_fraction: Share cut off at each end by "trimmed_mean".
    """

    sync: Literal["round", "step", "personal"] = "round"
    method: Literal["mean", "median", "trimmed_mean"] = "mean"
    trim_fraction: float = Field(0.1, ge=0, lt=0.5)


class DataSection(_Section):
    """What the clients agree on about their text.

    Attributes:
        max_tokens: Longest sequence; longer plain text is cut into pieces, other formats are truncated at the end.
        loss_on: "completion" takes no loss on prompts; "all" takes it everywhere.
        holdout: Share of each silo kept for validation.
    """

    max_tokens: int = Field(512, ge=2)
    loss_on: Literal["completion", "all"] = "completion"
    holdout: float = Field(0.1, ge=0, lt=1)


class WireSection(_Section):
    """Codecs of the two channels, and the largest tensor that a peer may announce.

    Attributes:
        hidden: Codec of hidden states, in both directions; "int8" has a scale per token.
        gradient: Codec of gradients, in both directions.
        max_tensor_mb: Largest tensor, in MiB as float32; a larger announcement ends the connection.
    """

    hidden: CodecName = "fp32"
    gradient: CodecName = "fp32"
    max_tensor_mb: int = Field(256, ge=1)


class TrustSection(_Section):
    """What the federation relies on; said at every start.

    Attributes:
        mode: "trusted-server": connections are encrypted, but the server can reconstruct the clients' text.
    """

    mode: Literal["trusted-server"] = "trusted-server"


class DurabilitySection(_Section):
    """What is kept on disk, and what of the server's state clients may have.

    Attributes:
        keep: Newest checkpoints that stay, on both sides.
        share_trunk: Whether clients may fetch the trunk's trained parameters, for `fedsea export`.
    """

    keep: int = Field(2, ge=2)
    share_trunk: bool = True


class ClientEntry(_Section):
    """A client of the federation. A key that is left out has the plan's value.

    Attributes:
        name: Common name of its certificate: lower-case letters, digits, dots, dashes, underscores; at most 63.
        input_blocks: Its own cut.
        output_blocks: Its own cut.
        micro_batch_sequences: Its own size of a micro-batch.
        micro_batches: Its own number of micro-batches in a step.
    """

    name: ClientName
    input_blocks: int | None = Field(None, ge=0)
    output_blocks: int | None = Field(None, ge=0)
    micro_batch_sequences: int | None = Field(None, ge=1)
    micro_batches: int | None = Field(None, ge=1)


class FederationPlan(_Section):
    """The whole plan. `load_plan` reads it; its order of clients is the order of turns and of sums.

    Attributes:
        name: Name of the federation, for displays.
        seed: Of the adapters' initial values, the held-out splits, the order of data, and dropout.
    """

    name: str = "federation"
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelSection
    partition: PartitionSection = PartitionSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    aggregation: AggregationSection = AggregationSection()
    data: DataSection = DataSection()
    wire: WireSection = WireSection()
    trust: TrustSection = TrustSection()
    durability: DurabilitySection = DurabilitySection()
    clients: tuple[ClientEntry, ...] = Field(min_length=1)

    @field_validator("clients")
    @classmethod
    def _names_differ(cls, clients: tuple[ClientEntry, ...]) -> tuple[ClientEntry, ...]:
        names = [client.name for client in clients]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"client names must differ; more than one is called {', '.join(doubled)}")
        return clients

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        training = self.training
        waits = training.mode == "batched" and training.wait != "all"
        if self.aggregation.sync == "step" and (training.mode != "batched" or waits):
            raise ValueError('aggregation.sync = "step" needs training.mode = "batched" and training.wait = "all"')
        if self.aggregation.sync == "step" and self.aggregation.method != "mean":
            raise ValueError('aggregation.sync = "step" sums gradients: set aggregation.method = "mean"')
        if self.aggregation.sync == "step" and self.optimizer.max_norm > 0 and self.optimizer.clip_scope != "global":
            raise ValueError('aggregation.sync = "step" needs optimizer.clip_scope = "global" (or max_norm = 0)')
        if training.min_clients > len(self.clients):
            raise ValueError("training.min_clients is larger than the number of clients")
        if self.model.dtype == "float16" and self.model.autocast != "none":
            raise ValueError('model.autocast = "bfloat16" cannot be used with model.dtype = "float16"')
        for side, training_there in (("input", self.adapter.input), ("output", self.adapter.output)):
            cuts = {getattr(self.partition_of(name), f"{side}_blocks") for name in self.client_names}
            if len(cuts) > 1 and training_there != self.adapter.trunk:
                raise ValueError(
                    f"clients differ in {side}_blocks, so some blocks are the trunk's for one and a client's for "
                    f"another: adapter.{side} must then be the same as adapter.trunk"
                )
        trained = {self.adapter.input, self.adapter.trunk, self.adapter.output}
        if trained == {"frozen"}:
            raise ValueError("every segment is frozen: nothing would be trained")
        return self

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names in the plan's order."""
        return tuple(client.name for client in self.clients)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the trunk over the whole run."""
        turns = len(self.clients) if self.training.mode == "sequential" else 1
        return self.training.rounds * self.training.steps_per_round * turns

    def trains_below_cut(self, name: str) -> bool:
        """Whether a client trains parameters before the trunk, and so needs the gradient at the trunk's input."""
        if self.adapter.input == "adapter":
            return self.partition_of(name).input_blocks > 0
        return self.adapter.input == "full"

    def sends_gradients(self, name: str) -> bool:
        """Whether gradients leave this client at all: not if only its output side is trained."""
        return self.adapter.trunk != "frozen" or self.trains_below_cut(name)

    @property
    def clients_train(self) -> bool:
        """Whether any client has trained parameters of its own."""
        cuts = [self.partition_of(name) for name in self.client_names]
        sides = ((self.adapter.input, "input_blocks"), (self.adapter.output, "output_blocks"))
        return any(
            training == "full" or (training == "adapter" and any(getattr(cut, side) for cut in cuts))
            for training, side in sides
        )

    def client(self, name: str) -> ClientEntry:
        """The entry of a client.

        Raises:
            ConfigError: The plan has no such client.
        """
        for entry in self.clients:
            if entry.name == name:
                return entry
        raise ConfigError(f"The plan has no client {name!r}; add a [[clients]] entry with that name at the server.")

    def partition_of(self, name: str) -> Partition:
        """The cut of a client: its own values where it has some, else the default."""
        entry, default = self.client(name), self.partition
        return Partition(
            default.input_blocks if entry.input_blocks is None else entry.input_blocks,
            default.output_blocks if entry.output_blocks is None else entry.output_blocks,
        )

    def micro_batches_of(self, name: str) -> tuple[int, int]:
        """Micro-batches a step, and sequences a micro-batch, of a client."""
        entry, default = self.client(name), self.training
        return (
            entry.micro_batches or default.micro_batches,
            entry.micro_batch_sequences or default.micro_batch_sequences,
        )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, defaults written out."""
        return _canonical(self.model_dump(mode="json"))

    def agreed(self) -> dict[str, Any]:
        """What both sides must agree on, as plain values.

        Once the fingerprint says which model it is, it does not matter where the server keeps it.
        """
        values = self.model_dump(mode="json")
        if self.model.fingerprint:
            del values["model"]["path"], values["model"]["revision"]
        return values

    def sha256(self) -> str:
        """Hash of the canonical JSON of what both sides must agree on, in hex."""
        return hashlib.sha256(_canonical(self.agreed()).encode()).hexdigest()


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


class ClientLimits(_Section):
    """What this client is willing to take part in; checked against the plan, never sent.

    Attributes:
        train: Segments that the federation may train here.
        min_input_blocks: Fewest blocks that must stay here before the cut.
        max_input_blocks: Most blocks that this machine can hold there.
        min_output_blocks: Fewest blocks that must stay here behind the trunk.
        max_output_blocks: Most blocks that this machine can hold there.
        codecs: Codecs that this client accepts.
        trust: Trust modes that this client accepts.
    """

    train: tuple[Literal["input", "output"], ...] = ("input", "output")
    min_input_blocks: int = Field(0, ge=0)
    max_input_blocks: int = Field(1024, ge=0)
    min_output_blocks: int = Field(0, ge=0)
    max_output_blocks: int = Field(1024, ge=0)
    codecs: tuple[CodecName, ...] = ("fp32", "bf16", "fp16", "int8")
    trust: tuple[str, ...] = ("trusted-server",)

    def check(self, plan: FederationPlan, name: str) -> None:
        """Refuse a plan that asks for more than this client gives.

        Raises:
            ConfigError: Names every field that is outside the limits.
        """
        cut, problems = plan.partition_of(name), []
        if plan.adapter.input != "frozen" and "input" not in self.train:
            problems.append(f"adapter.input = {plan.adapter.input!r}, but this client does not train its input segment")
        if plan.adapter.output != "frozen" and "output" not in self.train:
            problems.append(
                f"adapter.output = {plan.adapter.output!r}, but this client does not train its output segment"
            )
        for side, count in (("input", cut.input_blocks), ("output", cut.output_blocks)):
            least, most = getattr(self, f"min_{side}_blocks"), getattr(self, f"max_{side}_blocks")
            if not least <= count <= most:
                problems.append(f"{side}_blocks = {count}, but this client allows {least} to {most}")
        for channel in ("hidden", "gradient"):
            if (codec := getattr(plan.wire, channel)) not in self.codecs:
                problems.append(f"wire.{channel} = {codec!r}, but this client accepts {', '.join(self.codecs)}")
        if plan.trust.mode not in self.trust:
            problems.append(f"trust.mode = {plan.trust.mode!r}, but this client accepts {', '.join(self.trust)}")
        if problems:
            raise ConfigError(
                "The server's plan goes past this client's limits: " + "; ".join(problems) + ". "
                "Ask the operator for another plan, or widen the limits in your client settings."
            )


class _ClientSettings(_Section):
    """A client's settings file."""

    limits: ClientLimits = ClientLimits()


def _explain(error: ValidationError, source: str, model: type[BaseModel]) -> ConfigError:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "plan"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = _unknown(item["loc"], model)
        elif item["type"] == "missing":
            text = "is missing; add it"
        lines.append(f"{where}: {text}")
    return ConfigError(f"{source} is not usable: " + "; ".join(lines))


def _unknown(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """What was probably meant by a key that is none: one written alike, or the table that has one of this name."""
    *above, key = (str(part) for part in loc if isinstance(part, str))
    here: type[BaseModel] | None = model
    for part in above:
        here = _table(here, part) if here is not None else None
    known = list(here.model_fields) if here is not None else []
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key; did you mean `{near[0]}`?"
    tables = {name: found for name in model.model_fields if (found := _table(model, name)) is not None}
    homes = [name for name, table in tables.items() if key in table.model_fields]
    if homes and above[:1] != homes:
        return f"unknown key here; `{key}` belongs to the table [{homes[0]}]"
    if known and len(known) <= 3:
        return f"unknown key; known here: {', '.join(known)}"
    return "unknown key; see docs/reference/plan.md for the keys, or remove it"


def _table(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a table inside a model, also of a list of tables."""
    field = model.model_fields.get(name)
    if field is None:
        return None
    choices = (field.annotation, *typing.get_args(field.annotation))
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def parse_plan(values: dict[str, Any], source: str = "The plan") -> FederationPlan:
    """Check plain values, as from TOML or JSON.

    Raises:
        ConfigError: Names every bad or unknown key.
    """
    try:
        return FederationPlan.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source, FederationPlan) from None


def parse_plan_json(text: str) -> FederationPlan:
    """Check a plan that came over the wire.

    Raises:
        ConfigError: The text is no JSON object, or not a plan.
    """
    try:
        values = json.loads(text)
    except ValueError:
        raise ConfigError("The server's plan is not JSON; both sides need compatible versions of fedsea.") from None
    if not isinstance(values, dict):
        raise ConfigError("The server's plan is not a JSON object; both sides need compatible versions of fedsea.")
    return parse_plan(values, "The server's plan")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}; `fedsea init` writes an example federation.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the TOML file in it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None


def load_plan(path: Path) -> FederationPlan:
    """Read and check a plan file; a relative `model.path` that exists beside the file is made absolute.

    Raises:
        ConfigError: The file is missing, not TOML, or has bad or unknown keys.
    """
    values = _read_toml(path)
    plan = parse_plan(values, str(path))
    beside = path.parent / plan.model.path
    if not Path(plan.model.path).is_absolute() and beside.is_dir():
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"path": str(beside.resolve())})})
    return plan


def load_limits(path: Path) -> ClientLimits:
    """Read a client's limits from the `[limits]` table of its settings file.

    Raises:
        ConfigError: The file is missing, not TOML, or has bad or unknown keys.
    """
    try:
        return _ClientSettings.model_validate(_read_toml(path)).limits
    except ValidationError as error:
        raise _explain(error, str(path), _ClientSettings) from None


def differences(ours: FederationPlan, theirs: FederationPlan) -> list[str]:
    """Field by field, where two plans differ in what is agreed on: `["training.rounds: 3 here, 5 there", …]`."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
        if isinstance(value, list):
            return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{prefix}[{i}]").items()}
        return {re.sub(r"^\.", "", prefix): value}

    here, there = flat(ours.agreed(), ""), flat(theirs.agreed(), "")
    return [
        f"{key}: {here.get(key, 'absent')} here, {there.get(key, 'absent')} there"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
