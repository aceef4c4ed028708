"""The whole plan: rules between its keys, what follows from it for each client, its hash."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedsea.errors import ConfigError
from fedsea.plan.robust import check_robust
from fedsea.plan.sections import (
    AdapterSection,
    AggregationSection,
    ClientEntry,
    DataSection,
    DurabilitySection,
    InferenceSection,
    ModelSection,
    NoiseSection,
    OptimizerSection,
    PartitionSection,
    Section,
    TrainingSection,
    TrustSection,
    Whole,
    WireSection,
)
from fedsea.plan.secure import check_secure, threshold_of
from fedsea.plan.trained import trains
from fedsea.plan.trust import check_noise
from fedsea.types import Partition, SegmentKind


class FederationPlan(Section):
    """The whole plan. `load_plan` reads it; its order of clients is the order of turns and of sums.

    Attributes:
        name: Name of the federation, for displays.
        seed: Of the adapters' initial values, the held-out splits, the order of data, and dropout.
    """

    name: str = "federation"
    seed: Whole = Field(0, ge=0, lt=2**31)
    model: ModelSection
    partition: PartitionSection = PartitionSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    aggregation: AggregationSection = AggregationSection()
    data: DataSection = DataSection()
    wire: WireSection = WireSection()
    inference: InferenceSection = InferenceSection()
    trust: TrustSection = TrustSection()
    noise: NoiseSection = NoiseSection()
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
        if not self.trains_trunk and not all(self.trains_own(name) for name in self.client_names):
            raise ValueError(
                "nothing would be trained: every segment is frozen, or has no blocks, or none of the layers that "
                'adapter.targets names; set adapter.trunk = "adapter", or give the clients blocks to train'
            )
        check_noise(self)
        check_secure(self)
        check_robust(self)
        return self

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names in the plan's order."""
        return tuple(client.name for client in self.clients)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the trunk over the whole run."""
        turns = len(self.clients) if self.training.mode == "sequential" else 1
        return self.num_updates * turns

    @property
    def num_updates(self) -> int:
        """Steps that each client takes over the whole run."""
        return self.training.rounds * self.training.steps_per_round

    @property
    def trains_trunk(self) -> bool:
        """Whether the trunk has trained parameters; it always has blocks."""
        return trains(self.adapter, SegmentKind.TRUNK, 1)

    def trains_below_cut(self, name: str) -> bool:
        """Whether a client trains parameters before the trunk, and so needs the gradient at the trunk's input."""
        return trains(self.adapter, SegmentKind.INPUT, self.partition_of(name).input_blocks)

    def trains_output(self, name: str) -> bool:
        """Whether a client trains parameters behind the trunk, on which the gradients that leave it depend."""
        return trains(self.adapter, SegmentKind.OUTPUT, self.partition_of(name).output_blocks)

    def trains_own(self, name: str) -> bool:
        """Whether a client has trained parameters of its own, on either side."""
        return self.trains_below_cut(name) or self.trains_output(name)

    def sends_gradients(self, name: str) -> bool:
        """Whether gradients leave this client at the cut: not if only its output side is trained."""
        return self.trains_trunk or self.trains_below_cut(name)

    @property
    def clients_train(self) -> bool:
        """Whether any client has trained parameters of its own."""
        return any(self.trains_own(name) for name in self.client_names)

    @property
    def secure_threshold(self) -> int:
        """Clients that must stay to the end of a secure round."""
        return threshold_of(self)

    @property
    def most_round_tokens(self) -> int:
        """Target tokens of any one client in a round, at most."""
        steps, longest = self.training.steps_per_round, self.data.max_tokens
        batches = (self.micro_batches_of(name) for name in self.client_names)
        return max(steps * count * sequences * longest for count, sequences in batches)

    def client(self, name: str) -> ClientEntry:
        """The entry of a client.

        Raises:
            ConfigError: The plan has no such client.
        """
        for entry in self.clients:
            if entry.name == name:
                return entry
        raise ConfigError(f"The plan has no client {name!r}; add a [[clients]] entry with that name at the server.")

    def alone(self, name: str) -> Self:
        """This plan for a client that trains without a server: the others are left out, and nobody is waited for.

        Raises:
            ConfigError: The plan has no such client.
        """
        if name not in self.client_names:
            known = ", ".join(self.client_names)
            raise ConfigError(f"The plan has no client {name!r}: name one that it has ({known}).")
        training = self.training.model_copy(update={"mode": "batched", "wait": "all", "min_clients": 1})
        # Nobody to hide among, or to hide from; and every average of one is that one.
        aggregation = self.aggregation.model_copy(update={"secure": False, "method": "mean"})
        parts = {"clients": (self.client(name),), "training": training, "aggregation": aggregation}
        return self.model_copy(update=parts)

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

    def most_in_a_message(self, name: str, hidden_size: int, *, decodes: bool) -> tuple[int, int]:
        """Tokens, and sequences, that one message of a client may have; the server refuses more.

        Args:
            name: The client.
            hidden_size: H.
            decodes: Whether it connects to use the model, instead of training it.
        """
        _, sequences = self.micro_batches_of(name)
        tokens = sequences * self.data.max_tokens
        if decodes and self.inference.enabled:
            tokens = max(tokens, self.inference.most_rows)
            sequences = max(sequences, self.inference.max_sequences)
        return max(1, min(tokens, (self.wire.max_tensor_mb << 20) // (4 * hidden_size))), sequences

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
