"""What is audited: a plan, or a run of one, with its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsea.data.tokenizer import load_tokenizer
from fedsea.errors import ConfigError
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.plan import ClientEntry, FederationPlan, NoiseSection, PartitionSection, TrustSection, load_plan
from fedsea.plan.loading import parse_plan_json
from fedsea.storage import CheckpointStore
from fedsea.types import Channel, Partition

_PREFIX = "parameter."


@dataclass(frozen=True)
class Subject:
    """A client of a plan.

    Attributes:
        plan: Its plan.
        name: The client.
        checkpoint: The base model.
        tokenizer: The base model's.
        parameters: What the client's segments were trained to; None: as a run begins.
        run: The run folder, if one was given.
    """

    plan: FederationPlan
    name: str
    checkpoint: Checkpoint
    tokenizer: Any
    parameters: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    run: Path | None = None

    @property
    def partition(self) -> Partition:
        """The client's cut."""
        return self.plan.partition_of(self.name)

    def noise_std(self) -> dict[Channel, float]:
        """Channel to the standard deviation that the plan promises."""
        if self.plan.trust.mode != "noised":
            return {}
        return {channel: self.plan.noise.std(channel) for channel in Channel if self.plan.noise.std(channel)}


def open_subject(path: Path, model: str | None = None, client: str = "") -> Subject:
    """Read a plan file, or a client's run folder.

    Args:
        path: Either of them.
        model: This machine's copy of the base model, if not where the plan says.
        client: Which client of a plan file; its first one if empty.

    Raises:
        ConfigError: There is neither, or the model cannot be read.
    """
    parameters: dict[str, torch.Tensor] | None = None
    if path.is_dir():
        found = CheckpointStore(path / "checkpoints", read_only=True).latest()
        if found is None or "client" not in found[2]:
            raise ConfigError(
                f"{path} holds no run of a client: give a plan file, or the --run folder of `fedsea train`."
            )
        _, tensors, values = found
        plan, client = parse_plan_json(values["plan"]), str(values["client"])
        parameters = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    else:
        plan = load_plan(path)
    name = plan.client(client).name if client else plan.client_names[0]
    try:
        checkpoint = open_checkpoint(model or plan.model.path, plan.model.revision)
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(f"{error.message} Give this machine's copy of the base model with --model.") from None
    plan.partition_of(name).trunk(checkpoint.num_blocks)
    size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    tokenizer = load_tokenizer(str(checkpoint.folder), plan.model.revision, vocab_size=size)
    return Subject(plan, name, checkpoint, tokenizer, parameters, path if path.is_dir() else None)


def variant(
    plan: FederationPlan,
    name: str,
    *,
    partition: Partition | None = None,
    hidden_std: float | None = None,
    gradient_std: float = 0.0,
    plain_wire: bool = False,
) -> FederationPlan:
    """The plan of one client alone, with other settings of defence; for measuring beside it.

    Args:
        plan: As it is.
        name: The client that stays.
        partition: Another cut.
        hidden_std: Other noise, without a clip; 0 is none at all. None leaves the plan's.
        gradient_std: With `hidden_std`.
        plain_wire: fp32 codecs.
    """
    cut = partition or plan.partition_of(name)
    changed: dict[str, Any] = {
        "partition": PartitionSection(input_blocks=cut.input_blocks, output_blocks=cut.output_blocks),
        "clients": (ClientEntry(name=name),),
    }
    if hidden_std is not None:
        noised = hidden_std > 0 or gradient_std > 0
        changed["trust"] = TrustSection(mode="noised" if noised else "trusted-server")
        changed["noise"] = NoiseSection(hidden_std=hidden_std, gradient_std=gradient_std)
    if plain_wire:
        changed["wire"] = plan.wire.model_copy(update={"hidden": "fp32", "gradient": "fp32"})
    return plan.model_copy(update=changed)
