"""What is audited: a plan, or a run of one, with its base model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedsea.audit.applied import OF_THE_PLAN, applied
from fedsea.client.pseudonyms import trained_on_pseudonyms
from fedsea.data.tokenizer import load_tokenizer
from fedsea.errors import ConfigError
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.model.loading import check_plan
from fedsea.plan import (
    ClientEntry,
    ClientSettings,
    FederationPlan,
    NoiseSection,
    PartitionSection,
    TrustSection,
    load_plan,
    load_settings,
    open_channels,
)
from fedsea.plan.loading import parse_plan_json
from fedsea.storage import CheckpointStore
from fedsea.types import Channel, Partition, SegmentKind

_PREFIX = "parameter."
_OF_THE_SETTINGS = "that of the client's settings"
_CLIENTS, _SERVERS = (SegmentKind.INPUT, SegmentKind.OUTPUT), (SegmentKind.TRUNK,)


@dataclass(frozen=True)
class Subject:
    """A client of a plan.

    Attributes:
        plan: Its plan.
        name: The client.
        checkpoint: The base model.
        tokenizer: The base model's.
        parameters: What the client's segments were trained to; None: as a run begins.
        trunk: What the trunk was trained to; None: as a run begins.
        run: The run folder, if one was given.
        agreed: The plan as the server has it, where the client's own noise in `plan` is stricter; else None.
        noise_from: Where the noise in `plan` is known from, in words.
        pseudonyms: Whether the client's settings, or those that its run was trained with, have identifiers replaced
            before anything is tokenised.
        epochs: How often the client's run goes through its silo, all its steps together; 0: not known.
    """

    plan: FederationPlan
    name: str
    checkpoint: Checkpoint
    tokenizer: Any
    parameters: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    trunk: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    run: Path | None = None
    agreed: FederationPlan | None = None
    noise_from: str = OF_THE_PLAN
    pseudonyms: bool = False
    epochs: int = 0

    @property
    def stricter(self) -> dict[str, float]:
        """What the client's own noise changes of the plan's, by key."""
        if self.agreed is None:
            return {}
        ours, theirs = self.plan.noise.model_dump(), self.agreed.noise.model_dump()
        return {key: value for key, value in ours.items() if value != theirs[key]}

    @property
    def partition(self) -> Partition:
        """The client's cut."""
        return self.plan.partition_of(self.name)

    @property
    def states(self) -> str:
        """Which parameters are audited, in words."""
        if self.run is None:
            return "segments and trunk as a run begins"
        own = "segments as a run begins" if self.parameters is None else "the client's trained segments"
        if self.parameters is None and not self.plan.trains_own(self.name):
            own = "segments that are not trained"
        if not self.plan.trains_trunk:
            return f"{own}; the trunk is not trained"
        if self.trunk is None:
            return f"{own}, with the base model's trunk: this folder does not have the trained one"
        return f"{own}, with the trained trunk"

    @property
    def sent(self) -> Mapping[str, torch.Tensor]:
        """Trained parameters that the server has: the client's, if they leave it, alone or in a sum; its trunk's.

        After a round all have the same ones, so those of the run are those that the server has: with secure aggregation
        the mean, which is what the masks leave of the sum.
        """
        leaves = Channel.UPDATE in open_channels(self.plan, self.name)
        return {**self.parameters, **(self.trunk or {})} if leaves and self.parameters is not None else {}

    def noise_std(self) -> dict[Channel, float]:
        """Channel to the standard deviation that the plan promises."""
        if self.plan.trust.mode != "noised":
            return {}
        return {channel: self.plan.noise.std(channel) for channel in Channel if self.plan.noise.std(channel)}


def open_subject(path: Path, model: str | None = None, client: str = "", settings: Path | None = None) -> Subject:
    """Read a plan file, or a run folder, of a client or of the server.

    Args:
        path: One of them.
        model: This machine's copy of the base model, if not where the plan says.
        client: Which client of a plan file or of the server's run; the first one if empty.
        settings: This client's own settings file: its noise, where that is stricter, is audited; for a plan file only.

    Raises:
        ConfigError: There is neither, the model or the settings cannot be read, the client would refuse this plan, or
            settings are given for a run.
    """
    run = _open_run(path, client) if path.is_dir() else None
    if run is not None and settings is not None:
        raise ConfigError(
            "A run folder is audited with the noise that it was trained with; leave --settings out, or audit the plan."
        )
    plan, client = (load_plan(path), client) if run is None else (run.plan, run.client)
    name = plan.client(client).name if client else plan.client_names[0]
    own = ClientSettings() if settings is None else load_settings(settings)
    own.limits.check(plan, name)
    noise, where = own.noise.over(plan, name), OF_THE_PLAN if settings is None else _OF_THE_SETTINGS
    if run is not None:
        noise, where = applied(plan, name, path, run.run_id)
    agreed = None
    if noise != plan.noise:
        plan, agreed = plan.model_copy(update={"noise": noise}), plan
    try:
        checkpoint = open_checkpoint(model or plan.model.path, plan.model.revision)
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(f"{error.message} Give this machine's copy of the base model with --model.") from None
    plan.partition_of(name).trunk(checkpoint.num_blocks)
    check_plan(plan, checkpoint.config)
    size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    tokenizer = load_tokenizer(str(checkpoint.folder), plan.model.revision, vocab_size=size)
    pseudonyms = own.pseudonyms.enabled if run is None else trained_on_pseudonyms(path)
    subject = Subject(plan, name, checkpoint, tokenizer, agreed=agreed, noise_from=where, pseudonyms=pseudonyms)
    if run is None:
        return subject
    parameters, trunk = (_held(plan, checkpoint, name, run.tensors, kinds) for kinds in (_CLIENTS, _SERVERS))
    return replace(subject, parameters=parameters, trunk=trunk, run=path, epochs=run.epochs)


@dataclass(frozen=True)
class _Run:
    plan: FederationPlan
    client: str
    tensors: Mapping[str, torch.Tensor]
    run_id: str
    epochs: int = 0


def _open_run(path: Path, client: str) -> _Run:
    """A client's run folder, with the trunk if it trained alone; or the server's, with what it knows."""
    found = CheckpointStore(path / "checkpoints", read_only=True).latest()
    if found is None or not {"client", "rounds_done"} & found[2].keys():
        raise ConfigError(f"{path} holds no run of a client: give a plan file, or the --run folder of `fedsea train`.")
    tensors, values = dict(found[1]), found[2]
    plan = parse_plan_json(values["plan"])
    if "client" not in values:
        rounds = CheckpointStore(path / "rounds", read_only=True)
        known = rounds.load(values["rounds_done"])[0] if values["rounds_done"] in rounds.steps() else {}
        prefix = f"engine.{_PREFIX}"
        held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)} | known
        return _Run(plan, client, held, values["run_id"])
    own = str(values["client"])
    if client and client != own:
        raise ConfigError(f"{path} is the run of {own}, not of {client}: give that client's folder, or the plan file.")
    if (alone := CheckpointStore(path / "trunk", read_only=True).latest()) is not None:
        tensors |= alone[1]
    held = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    return _Run(plan, own, held, values["run_id"], _epochs(plan, values["state"]))


def _epochs(plan: FederationPlan, state: Mapping[str, Any]) -> int:
    """Of a client's whole run, by what it has made so far; 0 if it has made no step."""
    done = int(state["updates"])
    if not done or not state["data"]:
        return 0
    return math.ceil((int(state["data"]["epoch"]) + 1) * max(1.0, plan.num_updates / done))


def _held(
    plan: FederationPlan,
    checkpoint: Checkpoint,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    kinds: tuple[SegmentKind, ...],
) -> dict[str, torch.Tensor] | None:
    """The trained parameters of some segments; None if they are not all there."""
    wanted = adapters.trainable_shapes(checkpoint.config, plan.partition_of(name), kinds, plan.adapter)
    return {key: tensors[key] for key in wanted} if wanted and wanted.keys() <= tensors.keys() else None


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
