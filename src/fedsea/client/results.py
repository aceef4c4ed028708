"""What a data owner may ask of a run: its loss here, its adapter to take away, how the server stands."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedsea.client import setup
from fedsea.client.evaluation import evaluate as evaluate_batches
from fedsea.client.pseudonyms import refuse_without
from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.run_key import RunKey
from fedsea.client.setup import ClientOptions, Invited
from fedsea.client.state import ClientState, ClientStore, DataNote, Tensors
from fedsea.client.trunk import Standing
from fedsea.data.formats import DataFormat
from fedsea.data.silo import Silo
from fedsea.errors import ConfigError, DataError, FedseaError
from fedsea.federation.schedule import place
from fedsea.model import export
from fedsea.plan import FederationPlan
from fedsea.storage import check_new_folder
from fedsea.wire.channel import call_status
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import WireLimits

log = logging.getLogger(__name__)

Rows = Literal["held_out", "unchecked", "all", "all_of_other_files"]


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """Loss over a silo: nats per target token, and what goes with it.

    Attributes:
        segments: Which of this client's segments were used with the server's trunk: "trained", or the base model's.
        rows: "held_out" of the files of the training; "unchecked": those that a training on these files would hold out,
            where no run says which files it was trained on; "all" rows; or "all_of_other_files" than the training's.
    """

    mean_loss: float
    perplexity: float
    num_target_tokens: int
    segments: Literal["trained", "base"]
    rows: Rows


def evaluate(
    options: ClientOptions,
    everything: bool = False,
    base: bool = False,
    tell: Callable[[str], None] | None = None,
) -> EvalSummary:
    """Loss of the federation's model on this client's data, through the server.

    Args:
        options: `options.run` holds this client's training run with the server; its parameters are used, and, if
            `options` names no format of its own, its format of rows.
        everything: All rows, of any files, instead of the held-out split of those of the training.
        base: Use the base model's own segments with the server's trunk, whatever `options.run` holds.
        tell: Told what is being done meanwhile, for displays; None: nobody is.

    Raises:
        ConfigError: The run folder holds no run, or another one, or one that was trained on pseudonyms where the
            settings now have none.
        DataError: The held-out split is wanted, and the files are not those of the training in their order.
        FedseaError: The server cannot be reached, or the data cannot be used.
    """
    refuse_without(options.run, options.settings)
    tell = tell or setup.unsaid
    tell(setup.reaching(options))
    invited = setup.accept(options)
    plan, name = invited.plan, invited.name
    run = _run_if_any(options.run, invited.key) if base else own_run(options.run, invited.key)
    state, trained = (None, None) if base or run is None else run
    if trained is not None and options.data_format == DataFormat():
        known = ClientStore.format_of(options.run)
        options = replace(options, format=known.name, fields=known.fields)
    tell(setup.CHECKING)
    checkpoint = setup.open_base_model(plan, options, name)
    tell(setup.READING)
    silo = setup.open_data(plan, checkpoint, options, name)
    rows = rows_of(options, None if run is None else run[0], silo, everything=everything)
    tell(setup.LOADING)
    segments = setup.load_segments(plan, checkpoint, name, options.device)
    if trained is not None:
        segments.load_tensors(trained)
    if state is not None:
        say_if_apart(plan, name, state, status(options.server, options.identity)["next_step"], options.run)
    batches = setup.every_row(plan, silo, name) if everything else setup.held_out(plan, silo, name)
    limits, run_id = setup.wire_limits(plan, checkpoint, name), invited.invitation.run_id
    tell("evaluating")
    with setup.open_boundary(plan, name, run_id, options) as boundary, observing(options, invited, limits) as trunk:
        loss, tokens = evaluate_batches(segments, trunk, boundary, batches, plan)
    return EvalSummary(loss, math.exp(min(loss, 700.0)), tokens, "base" if base else "trained", rows)


def rows_of(options: ClientOptions, state: ClientState | None, silo: Silo, *, everything: bool) -> Rows:
    """What the rows to be evaluated are to the training.

    Args:
        options: With the files and the run folder.
        state: Where this client's run in that folder stands; None if there is none.
        silo: The opened files.
        everything: All rows are wanted, not the held-out split.

    Raises:
        DataError: The held-out split is wanted, and these are other files: which rows are held out goes by their
            number, so that of other files, or in another order, it may hold rows that were trained on.
    """
    if state is None:
        return "all" if everything else "unchecked"
    noted = ClientStore.data_of(options.run)
    if noted.files_sha256:
        same = noted.means(DataNote.of(options.data, silo))
    else:  # a run of an earlier version: what its place in the data remembers
        same = state.data.get("data") == silo.fingerprint()
    if everything:
        return "all" if same else "all_of_other_files"
    if not same:
        raise DataError(
            f"These are not the files that the run in {options.run} is trained on (in their order, with the --format, "
            "--field and --skip-bad-rows of the training), so what was held out of it cannot be told from what was "
            "trained on: give those files, or --all to evaluate every row of these."
        )
    return "held_out"


def export_adapter(
    options: ClientOptions, out: Path, merged: bool = False, tell: Callable[[str], None] | None = None
) -> None:
    """Write the whole model's adapter: this client's part, and the trunk's, fetched from the server.

    Args:
        options: With the run folder of a training run.
        out: Folder to write: a PEFT adapter, or a whole checkpoint.
        merged: Merge into the base weights (which must all be here).
        tell: Told what is being done meanwhile, for displays; None: nobody is.

    Raises:
        ConfigError: `out` holds something already, the run folder holds no run or another one, or its run and the
            server's trunk are not at one step.
        FedseaError: The server cannot be reached or does not share the trunk.
    """
    check_new_folder(out)
    tell = tell or setup.unsaid
    tell(setup.reaching(options))
    invited = setup.ask(options)
    plan, name = invited.plan, invited.name
    state, found = _look(options.run, invited.key)
    tell(setup.CHECKING)
    checkpoint = setup.open_base_model(plan, options, name)
    tell("fetching the trunk's part")
    with observing(options, invited, setup.wire_limits(plan, checkpoint, name, trunk=True)) as trunk:
        theirs = trunk.fetch().result()
    ended = ClientStore.ended(options.run)
    finished = ended is not None and ended.belongs_to(invited.key) and ended.standing.next_step == state.next_step
    check_steps(plan, name, state, theirs.next_step, options.run, finished=finished)
    tell("writing")
    prefix = "parameter."
    ours = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    export.write(out, checkpoint, {**dict(theirs.tensors), **ours}, plan, merged=merged)  # type: ignore[arg-type]
    log.info("wrote %s", out)


def status(server: str, identity: Path) -> dict[str, Any]:
    """How a server stands.

    Raises:
        FedseaError: It cannot be reached or refuses.
    """
    return asyncio.run(call_status(server, Identity.load(identity)))


def own_run(run: Path, key: RunKey) -> tuple[ClientState, Tensors]:
    """Where this client's training run stands, and what it left, for `ClientSegments.load_tensors`.

    Raises:
        ConfigError: The folder holds no run, or another one.
    """
    return _look(run, key, " With --base, the base model's own segments are used with the server's trunk.")


def _run_if_any(run: Path, key: RunKey) -> tuple[ClientState, Tensors] | None:
    try:
        return ClientStore.look(run, key)
    except FedseaError:
        return None


def _look(run: Path, key: RunKey, otherwise: str = "") -> tuple[ClientState, Tensors]:
    found = ClientStore.look(run, key)
    if found is None:
        raise ConfigError(f"{run} holds no training run: give the run folder of `fedsea train` with --run.{otherwise}")
    return found


def observing(options: ClientOptions, invited: Invited, limits: WireLimits) -> RemoteTrunk:
    """The server's trunk for a client that takes part in no step, to be entered as a context."""
    return RemoteTrunk(
        options.server,
        invited.keeper.current,
        invited.invitation,
        limits,
        Standing,
        options.retry,
        role="observe",
        answer_within_s=options.answer_within_s,
    )


class PartsWatch:
    """`say_if_apart` for each version of the trunk that answers come from, once. Any number of threads may call it.

    Sessions see the trunk as it was published last, at the start of the run or at the end of a round; how far the
    server is by now says nothing about them.

    Args:
        plan: The federation's plan.
        name: The client.
        state: Where its run stands.
        run: Its run folder.
    """

    def __init__(self, plan: FederationPlan, name: str, state: ClientState, run: Path) -> None:
        self._about = plan, name, state, run
        self._lock = threading.Lock()
        self._seen: set[int] = set()

    def __call__(self, version: int) -> None:
        """Answers come from the trunk as it was after so many steps."""
        with self._lock:
            if version in self._seen:
                return
            self._seen.add(version)
        plan, name, state, run = self._about
        say_if_apart(plan, name, state, version, run)


def say_if_apart(plan: FederationPlan, name: str, state: ClientState, trunk_step: int, run: Path) -> None:
    """In the middle of a run the parts may be at different steps; whoever uses the model has to know."""
    try:
        check_steps(plan, name, state, trunk_step, run, finished=state.next_step == trunk_step)
    except ConfigError:
        log.warning(
            "The run in %s is at step %d and the server's trunk that answers here at step %d: these parts were not "
            "trained together, and the model is worse for it. Start this again when the run is finished.",
            run,
            state.next_step,
            trunk_step,
        )


def check_steps(
    plan: FederationPlan, name: str, state: ClientState, trunk_step: int, run: Path, *, finished: bool
) -> None:
    """Refuse to put a client's segments and a trunk together that were not trained together.

    They belong together if the client took part in the trunk's last step, or if nothing of this client's has happened
    since: others' turns, a round whose average it has taken over, or, as the server told it at the end (`finished`),
    steps that did not wait for it.

    Raises:
        ConfigError: Says which of the two is behind, and what to do.
    """
    if state.next_step > trunk_step:
        raise ConfigError(
            f"The server's trunk is behind the run in {run}: it is at step {trunk_step}, the run at {state.next_step}. "
            "Ask the operator to restore the newest run folder at the server, or to finish its run; then export again."
        )
    start, rounds_done = state.next_step, 0
    if plan.aggregation.sync == "round" and plan.clients_train and trunk_step:
        last = place(plan, trunk_step - 1)
        rounds_done = last.round + last.ends_round
        start = max(start, state.rounds_done * (plan.num_steps // plan.training.rounds))
    own = not finished and any(name in place(plan, step).members for step in range(start, trunk_step))
    if state.rounds_done < rounds_done or own:
        raise ConfigError(
            f"The run in {run} is behind the server's trunk: it is at step {state.next_step} with {state.rounds_done} "
            f"rounds averaged, the trunk at step {trunk_step} of {plan.num_steps}. Start `fedsea train` with this "
            "folder again and let it finish; then export again."
        )
