"""Starts a server: resolves the plan, loads the trunk, serves until the run is over or a signal comes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from fedsea.errors import ConfigError, FedseaError
from fedsea.model import adapters, export
from fedsea.model.checkpoint import Checkpoint, open_checkpoint
from fedsea.model.fingerprint import fingerprint
from fedsea.model.loading import check_plan, trainable_trunk
from fedsea.plan import FederationPlan, load_plan, parse_plan_json, server_statement
from fedsea.server.engine import Engine
from fedsea.server.executor.local import EngineThread
from fedsea.server.ports import Member
from fedsea.server.service import Service
from fedsea.server.state import RunState, ServerStore
from fedsea.storage import check_new_folder, write_bytes_atomic
from fedsea.types import BlockRange, SegmentKind
from fedsea.wire.identity.authority import Authority
from fedsea.wire.identity.certificates import Role, utc_now
from fedsea.wire.identity.identity import Identity, needs_renewal
from fedsea.wire.identity.peers import PeerGate
from fedsea.wire.identity.signing import CertificateVerifier
from fedsea.wire.limits import HANDSHAKE
from fedsea.wire.server import WireServer
from fedsea.wire.server import serve as listen

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of a server that are not the federation's business.

    Attributes:
        plan: Plan file.
        listen: `HOST:PORT`; port 0 takes a free one.
        identity: Folder of the server's identity.
        ca: Folder of the authority (or a copy of its certificate and journal), for the gate and for renewals.
        run: Run folder.
        threads: CPU threads of the engine; None leaves torch's choice.
        device: Where the trunk runs.
        exit_when_finished: End when the run is finished and every client has left.
        ready_file: Gets `HOST:PORT` as soon as clients may connect.
    """

    plan: Path
    listen: str
    identity: Path
    ca: Path
    run: Path
    threads: int | None = None
    device: str = "cpu"
    exit_when_finished: bool = False
    ready_file: Path | None = None


class Watcher(Protocol):
    """Who is shown how the server stands, several times a second."""

    def __call__(self, status: dict[str, Any]) -> None:
        """Takes `Service.status()`."""
        ...


def trunk_blocks(plan: FederationPlan, num_blocks: int) -> BlockRange:
    """Blocks that some client leaves to the trunk: the server holds them all."""
    ranges = [plan.partition_of(name).trunk(num_blocks) for name in plan.client_names]
    return BlockRange(min(r.start for r in ranges), max(r.stop for r in ranges))


def resolve(plan: FederationPlan, checkpoint: Checkpoint) -> FederationPlan:
    """The plan with the fingerprint of every unit of the model filled in.

    Raises:
        ConfigError: The plan does not fit the model, or it names a fingerprint already, and the checkpoint has another
            one.
    """
    check_plan(plan, checkpoint.config)
    found = fingerprint(checkpoint)
    wrong = [unit for unit, expected in plan.model.fingerprint.items() if found.get(unit) != expected]
    if wrong:
        raise ConfigError(
            f"The checkpoint {plan.model.path} is not the one that the plan names: {', '.join(sorted(wrong))} differ. "
            "Get the right checkpoint, or remove model.fingerprint from the plan."
        )
    return plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": found})})


def load_engine(plan: FederationPlan, checkpoint: Checkpoint, device: str) -> Engine:
    """The trunk's blocks with their adapters, ready to run."""
    trunk = trainable_trunk(plan, checkpoint, trunk_blocks(plan, checkpoint.num_blocks), device)
    return Engine(trunk, plan)


def make_roster(plan: FederationPlan, checkpoint: Checkpoint) -> dict[str, Member]:
    """What each client of the plan has."""
    kinds = (SegmentKind.INPUT, SegmentKind.OUTPUT)
    roster = {}
    for name in plan.client_names:
        cut = plan.partition_of(name)
        shapes = adapters.trainable_shapes(checkpoint.config, cut, kinds, plan.adapter)
        roster[name] = Member(cut.trunk(checkpoint.num_blocks), shapes)
        _check_sizes(plan, checkpoint, name, shapes)
    return roster


def _check_sizes(
    plan: FederationPlan, checkpoint: Checkpoint, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse at the start what the wire would refuse in the middle of the run."""
    _, sequences = plan.micro_batches_of(name)
    largest = max([prod(shape) for shape in shapes.values()], default=0)
    largest = max(largest, sequences * plan.data.max_tokens * checkpoint.hidden_size)
    if 4 * largest > plan.wire.max_tensor_mb << 20:
        raise ConfigError(
            f"Client {name} may have to send a tensor of {4 * largest / 2**20:.0f} MB: raise wire.max_tensor_mb "
            f"({plan.wire.max_tensor_mb}), or lower micro_batch_sequences or data.max_tokens."
        )


def serve(options: ServerOptions, watch: Watcher | None = None) -> None:
    """Run a server until its run is over (with `exit_when_finished`), or a signal ends it.

    Args:
        options: See `ServerOptions`.
        watch: Told how the server stands, a few times a second.

    Raises:
        FedseaError: The server cannot start or cannot go on; state on disk is whole.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = load_plan(options.plan)
    log.info("loading the trunk of %s", plan.model.path)
    identity = Identity.load(options.identity)
    identity.check_role(Role.SERVER)
    gate = PeerGate(options.ca, plan.client_names)
    checkpoint = open_checkpoint(plan.model.path, plan.model.revision)
    plan = resolve(plan, checkpoint)
    roster = make_roster(plan, checkpoint)
    store = ServerStore(options.run, plan)
    try:
        engine = load_engine(plan, checkpoint, options.device)
        state = store.restore(engine)
        if state is None:
            state = RunState(run_id=secrets.token_hex(8))
            store.save(engine, state)
        write_bytes_atomic(options.run / "plan.json", plan.model_dump_json(indent=2).encode())
        log.warning("%s", server_statement(plan))
        with EngineThread() as executor:
            asyncio.run(_serve(options, plan, engine, store, state, roster, executor, identity, gate, watch))
    finally:
        store.close()


async def _serve(
    options: ServerOptions,
    plan: FederationPlan,
    engine: Engine,
    store: ServerStore,
    state: RunState,
    roster: dict[str, Member],
    executor: EngineThread,
    identity: Identity,
    gate: PeerGate,
    watch: Watcher | None,
) -> None:
    verifier = CertificateVerifier(identity.ca_pem)
    service = Service(plan, engine, store, state, roster, executor, verifier, gate.barred)
    stopped = asyncio.Event()
    if threading.current_thread() is threading.main_thread():  # elsewhere, signals are somebody else's
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = await listen(
        options.listen,
        identity,
        gate,
        service.handle,
        status=service.status,
        renew=_renewal(options.ca),
        refused=service.refused,
        limits=HANDSHAKE,
        sealed=plan.wire.sealed,
    )
    address = f"{options.listen.rpartition(':')[0]}:{server.port}"
    log.info("listening on %s", address)
    if options.ready_file is not None:
        write_bytes_atomic(options.ready_file, address.encode())
    chores: list[Coroutine[Any, Any, None]] = [service.tick(), _stay_valid(server, identity, options)]
    if watch is not None:
        chores.append(_watch(service, watch))
    try:
        await _beside(_until_over(service, stopped, options.exit_when_finished), *chores)
    except FedseaError:
        watch = None  # it may be what failed
        raise
    finally:
        await _close(server)
        if watch is not None:
            watch(service.status())
    if service.coordinator.failure is not None:
        raise service.coordinator.failure


async def _beside(work: Coroutine[Any, Any, None], *chores: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end while endless chores run beside it; one that fails ends everything.

    Raises:
        FedseaError: A chore failed; the log has what is not for the user.
    """
    main, *others = tasks = [asyncio.create_task(one) for one in (work, *chores)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            if task.done() and (error := task.exception()) is not None:
                log.error("The server stops: a task that it cannot do without has failed.", exc_info=error)
                if isinstance(error, FedseaError):
                    raise error
                raise FedseaError(
                    "The server stopped because of an error of its own, which is in its log; what was applied is on "
                    "disk. Report it, and start the server again."
                )
        await main
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_over(service: Service, stopped: asyncio.Event, exit_when_finished: bool) -> None:
    waits = [asyncio.create_task(stopped.wait()), asyncio.create_task(service.over.wait())]
    while True:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[0] in done or exit_when_finished or service.coordinator.failure is not None:
            break
        waits = waits[:1]
    for wait in waits:
        wait.cancel()


async def _watch(service: Service, watch: Watcher) -> None:
    while True:
        watch(service.status())
        await asyncio.sleep(0.25)


async def _stay_valid(server: WireServer, identity: Identity, options: ServerOptions) -> None:
    """Renew the server's own certificate in time, if the authority's key is at hand."""
    while True:
        if needs_renewal(identity, utc_now()):
            try:
                Authority.open(options.ca).issue_server(folder=options.identity)
                identity = Identity.load(options.identity)
                server.replace_identity(identity)
                log.info("the server's certificate was renewed until %s", f"{identity.not_after:%Y-%m-%d %H:%M}")
            except FedseaError as error:
                log.warning("The server's certificate could not be renewed: %s", error.message)
        await asyncio.sleep(_LOOK_EVERY_S)


async def _close(server: WireServer) -> None:
    await server.stop(grace_s=1.0)


def _renewal(ca: Path) -> Callable[..., bytes] | None:
    """Signs renewals if the authority's key is at hand."""
    try:
        authority = Authority.open(ca)
    except ConfigError:
        return None
    return lambda _peer, certificate_pem, request: authority.renew(certificate_pem, request).pem


def export_run(run: Path, out: Path, merged: bool = False) -> None:
    """Write the whole model's adapter from a server's run folder, as it was after the last complete round.

    Args:
        run: Run folder of a server; the plan in it names the base model.
        out: Folder to write: a PEFT adapter, or a whole checkpoint.
        merged: Merge into the base weights.

    Raises:
        ConfigError: `out` holds something already, there is no run, no round is complete, or the clients' parameters
            are personal.
    """
    check_new_folder(out)
    try:
        plan = parse_plan_json((run / "plan.json").read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{run} is not a server's run folder: give the one of `fedsea server` with --run.") from None
    tensors = ServerStore.peek(run, plan)
    export.write(out, open_checkpoint(plan.model.path, plan.model.revision), tensors, plan, merged=merged)
