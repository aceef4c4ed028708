"""From a server's plan to a client that is ready to train: limits, checkpoint, segments, data."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch

from fedsea.client import accounts
from fedsea.client.accounts import own_noise
from fedsea.client.invitation import Invitation, seek_invitation
from fedsea.client.options import ClientOptions as ClientOptions
from fedsea.client.pseudonyms import pseudonyms_of
from fedsea.client.renewal import IdentityKeeper
from fedsea.client.run_key import RunKey
from fedsea.client.segments import ClientSegments
from fedsea.data.batches import BatchStream, evaluation_batches, pack
from fedsea.data.opening import open_silo
from fedsea.data.silo import Silo
from fedsea.data.tokenizer import load_tokenizer
from fedsea.errors import ConfigError
from fedsea.model import adapters
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.model.fingerprint import check, fingerprint, units_of
from fedsea.model.loading import check_plan, trainable_ends
from fedsea.plan import ClientLimits, FederationPlan, load_limits, trust_statement
from fedsea.privacy.boundary import Boundary
from fedsea.types import Channel, SegmentKind, TokenBatch
from fedsea.wire.limits import WireLimits

log = logging.getLogger(__name__)

CHECKING = "checking the base model"
READING = "reading the data"
LOADING = "loading the model's input and output blocks"
LOADING_ALL = "loading the model's blocks"
"""What is being done, for displays; see also `reaching`."""


@dataclass(frozen=True, slots=True)
class Invited:
    """A client that a server has sent its plan."""

    keeper: IdentityKeeper
    invitation: Invitation

    @property
    def plan(self) -> FederationPlan:
        """The server's plan."""
        return self.invitation.plan

    @property
    def name(self) -> str:
        """This client, as its certificate says."""
        return self.keeper.current().name

    @property
    def key(self) -> RunKey:
        """The run that this client's folder must hold."""
        return RunKey(self.plan, self.invitation.run_id, self.name)


def unsaid(_what: str) -> None:
    """Tells nobody what is being done."""


def reaching(options: ClientOptions) -> str:
    """What is being done, for displays, as long as the server has not answered."""
    return f"reaching the server {options.server}"


def ask(options: ClientOptions) -> Invited:
    """Fetch the server's plan.

    Raises:
        FedseaError: The server cannot be reached or refuses, or this machine's identity cannot be used.
    """
    keeper = IdentityKeeper(options.identity, options.server)
    return Invited(keeper, asyncio.run(seek_invitation(options.server, keeper.current, options.retry)))


def accept(options: ClientOptions) -> Invited:
    """Fetch the server's plan, hold it against this client's own limits, and say what trust it asks for.

    Raises:
        ConfigError: The plan goes past the limits.
        FedseaError: As for `ask`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    invited = ask(options)
    check_limits(invited.plan, invited.name, options)
    noise = own_noise(options.settings).over(invited.plan, invited.name)
    log.warning("%s", trust_statement(invited.plan, invited.name, noise))
    if invited.invitation.sealed:
        log.info("Payloads are sealed between this client and the server: whoever carries them reads nothing.")
    return invited


def open_boundary(
    plan: FederationPlan, name: str, run_id: str, options: ClientOptions, *, own_run: bool = False
) -> contextlib.AbstractContextManager[Boundary]:
    """The only maker of releases, with the ledger that they are charged to; see `client.accounts`."""
    return accounts.open_boundary(
        plan,
        name,
        run_id,
        identity=options.identity,
        run=options.run,
        settings=options.settings,
        own_run=own_run,
    )


def check_limits(plan: FederationPlan, name: str, options: ClientOptions) -> None:
    """Refuse a plan that goes past this client's own limits.

    Raises:
        ConfigError: Names every field.
    """
    limits = ClientLimits() if options.settings is None else load_limits(options.settings)
    limits.check(plan, name)


def open_base_model(plan: FederationPlan, options: ClientOptions, name: str) -> Checkpoint:
    """This client's copy of the base model, checked against the plan's fingerprint.

    Raises:
        ConfigError: It is missing, or another model, or the plan does not fit it.
    """
    path = options.model or plan.model.path
    try:
        checkpoint = open_checkpoint(path, plan.model.revision)
    except ConfigError as error:
        if options.model is not None:
            raise
        raise ConfigError(f"{error.message} Give this machine's copy of the base model with --model.") from None
    cut, count = plan.partition_of(name), checkpoint.num_blocks
    cut.trunk(count)
    check_plan(plan, checkpoint.config)
    units = units_of(SegmentKind.INPUT, cut, count) + units_of(SegmentKind.OUTPUT, cut, count)
    check(plan.model.fingerprint, fingerprint(checkpoint, units))
    return checkpoint


def load_segments(plan: FederationPlan, checkpoint: Checkpoint, name: str, device: str) -> ClientSegments:
    """The client's two segments with their adapters."""
    input_blocks, output_blocks = trainable_ends(plan, checkpoint, plan.partition_of(name), device)
    return ClientSegments(plan, name, input_blocks, output_blocks)


def open_data(plan: FederationPlan, checkpoint: Checkpoint, options: ClientOptions, name: str = "") -> Silo:
    """The silo, tokenised for the base model, with pseudonyms if the client `name` wants them.

    Raises:
        DataError: A file cannot be used.
        ConfigError: No file was given, or the tokenizer does not fit the model.
    """
    if not options.data:
        raise ConfigError("No data files were given: name the silo's files with --data.")
    vocab_size = int(checkpoint.config.get_text_config(decoder=True).vocab_size)
    tokenizer = load_tokenizer(str(checkpoint.folder), plan.model.revision, vocab_size=vocab_size)
    silo = open_silo(
        options.data,
        tokenizer,
        plan.data,
        format=options.data_format,
        seed=plan.seed,
        on_bad_row="skip" if options.skip_bad_rows else "error",
        rewrite=pseudonyms_of(options.settings, name, options.run),
    )
    for warning in silo.summary().warnings():
        log.warning("%s", warning)
    return silo


def open_stream(plan: FederationPlan, silo: Silo, name: str) -> BatchStream:
    """Training batches in this client's own order."""
    _, sequences = plan.micro_batches_of(name)
    return BatchStream(silo, seed=adapters.derive_seed(plan.seed, name, "order"), sequences_per_batch=sequences)


def held_out(plan: FederationPlan, silo: Silo, name: str) -> Iterator[TokenBatch]:
    """The held-out split, in micro-batches."""
    _, sequences = plan.micro_batches_of(name)
    return evaluation_batches(silo, sequences_per_batch=sequences, max_sequences=None)


def every_row(plan: FederationPlan, silo: Silo, name: str) -> Iterator[TokenBatch]:
    """The whole silo, in micro-batches."""
    _, sequences = plan.micro_batches_of(name)
    rows = chain(iter(silo.train()), iter(silo.heldout()))
    while batch := list(islice(rows, sequences)):
        yield pack(batch)


def wire_limits(plan: FederationPlan, checkpoint: Checkpoint, name: str, *, trunk: bool = False) -> WireLimits:
    """What the server may announce to this client.

    Args:
        plan: The plan.
        checkpoint: The base model.
        name: The client.
        trunk: Also the trunk's parameters, for an export.
    """
    kinds = (SegmentKind.INPUT, SegmentKind.OUTPUT)
    shapes = dict(adapters.trainable_shapes(checkpoint.config, plan.partition_of(name), kinds, plan.adapter))
    if trunk:
        for client in plan.client_names:
            cut = plan.partition_of(client)
            shapes |= adapters.trainable_shapes(checkpoint.config, cut, (SegmentKind.TRUNK,), plan.adapter)
    max_tensor_bytes = plan.wire.max_tensor_mb << 20
    return WireLimits(
        hidden_size=checkpoint.hidden_size,
        max_tokens=max(1, max_tensor_bytes // (4 * checkpoint.hidden_size)),
        max_sequences=4096,
        max_tensor_bytes=max_tensor_bytes,
        codecs={Channel.HIDDEN: plan.wire.hidden, Channel.GRADIENT: plan.wire.gradient},
        bundle_shapes=shapes,
        num_blocks=checkpoint.num_blocks,
    )
