"""What the server must not forget, and how it is kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsea.errors import ConfigError, ProtocolError
from fedsea.federation.schedule import place
from fedsea.plan import FederationPlan, differences, parse_plan_json
from fedsea.server.engine import Engine, Outcome
from fedsea.storage import CheckpointStore
from fedsea.wire.messages import Join

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class RunState:
    """Where the run stands.

    Attributes:
        run_id: Random identity; clients keep their state per run.
        next_step: First step that is not applied yet.
        rounds_done: Rounds whose aggregation is durable.
        outcomes: Client to the outcome of the last step it took part in, for a client that missed the message.
        result: Aggregated parameters of the last round.
        round_tokens: Client to the target tokens of its steps since the last aggregation, as counted here.
        skipped: Rounds that were closed without an aggregation since the one that `result` is of.
    """

    run_id: str
    next_step: int = 0
    rounds_done: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    result: dict[str, torch.Tensor] = field(default_factory=dict)
    round_tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def check_standing(self, name: str, join: Join, *, strict: bool) -> None:
        """Whether what a client holds and what the server holds belong together.

        Args:
            name: The client.
            join: Where it says it stands.
            strict: A client may not have missed a step that it took part in.

        Raises:
            ProtocolError: One of the two has an older run folder than the other.
        """
        if join.next_step > self.next_step or join.round > self.rounds_done:
            raise ProtocolError(
                f"Client {name} is at step {join.next_step}, the server at {self.next_step}: the server's run folder "
                "is older than the client's. Restore the newest run folder at the server."
            )
        outcome = self.outcomes.get(name)
        if not strict or outcome is None or join.next_step > outcome.step:
            return
        # A client that prepared a step has applied all of its own before, however many were others' turns: it refuses
        # its folder itself if not (`ClientStore.restore`).
        if join.prepared_step != outcome.step:
            raise ProtocolError(
                f"Client {name} took part in step {outcome.step} of this run already, which its run folder does not "
                "know: another --run folder was given, or an older copy of it, or another process of this client "
                "trains. Go on with the newest run folder at that client; a new run needs a new one at the server, too."
            )


def _check_round_ended(folder: Path, plan: FederationPlan, next_step: int, rounds_done: int) -> None:
    """Refuse to put the clients' last aggregate and a trunk together that has trained on since."""
    last = place(plan, next_step - 1)
    if last.ends_round and rounds_done == last.round + 1:
        return
    raise ConfigError(
        f"The run in {folder} is in the middle of a round: its trunk is at step {next_step}, the clients' parameters "
        f"are those of {rounds_done} complete rounds of {plan.training.rounds}, and these were not trained together. "
        "Let the run go on to the end of a round; then export again."
    )


class ServerStore:
    """The server's run folder: where the run stands, and what it was at the end of each round.

    `checkpoints/` holds trunk, optimizer and state, `rounds/` the aggregates, `trunks/` the trunk's parameters that
    belong to them, for exports.

    Args:
        folder: Run folder; made if absent.
        plan: The resolved plan; compared with the one that the folder was made with.

    Raises:
        ConfigError: The folder belongs to another plan; the message names the fields that differ.
    """

    def __init__(self, folder: Path, plan: FederationPlan) -> None:
        self.folder = folder
        self.plan = plan
        self._checkpoints = CheckpointStore(folder / "checkpoints", keep=plan.durability.keep)
        self._rounds = CheckpointStore(folder / "rounds", keep=plan.durability.keep)
        self._trunks = CheckpointStore(folder / "trunks", keep=plan.durability.keep)

    @staticmethod
    def peek(folder: Path, plan: FederationPlan) -> dict[str, torch.Tensor]:
        """Trained parameters of all segments in a run folder, without locking it, as they were at the last aggregation.

        Raises:
            ConfigError: No round is complete, the clients' parameters never reach the server, or an older version kept
                no trunk with the round's aggregate and it has trained on since.
        """
        if plan.aggregation.sync == "personal" and plan.clients_train:
            raise ConfigError(
                'aggregation.sync = "personal": each client has its own segments, which the server does not know. Run '
                "`fedsea export` at a client instead."
            )
        found = CheckpointStore(folder / "checkpoints", read_only=True).latest()
        if found is None:
            raise ConfigError(f"{folder} holds no checkpoint: start `fedsea server` with this run folder first.")
        _, tensors, values = found
        if "rounds_done" not in values:
            raise ConfigError(f"{folder} is a client's run folder: give the one of `fedsea server`.")
        prefix = "engine.parameter."
        now = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        rounds = CheckpointStore(folder / "rounds", read_only=True)
        number = values["rounds_done"] - values.get("skipped", 0)
        if number not in rounds.steps():
            if plan.clients_train:
                raise ConfigError(f"No round is complete in {folder}: export when the first one is.")
            return now
        result, trunks = rounds.load(number)[0], CheckpointStore(folder / "trunks", read_only=True)
        if number in trunks.steps():
            then, about = trunks.load(number)
            if about["next_step"] != values["next_step"]:
                log.info("taken is the model as it was after step %d, at its last averaging", about["next_step"])
            return then | result
        if now and plan.clients_train:  # a run of a version that kept the clients' part only
            _check_round_ended(folder, plan, values["next_step"], number)
        return now | result

    def restore(self, engine: Engine) -> RunState | None:
        """Load the newest checkpoint into `engine`.

        Returns:
            The state of the run, or None if the folder has no checkpoint yet.
        """
        found = self._checkpoints.latest()
        if found is None:
            return None
        _, tensors, values = found
        self._check_plan(values)
        engine.load_tensors({n.removeprefix("engine."): t for n, t in tensors.items() if n.startswith("engine.")})
        engine.next_step = values["next_step"]
        gradients = {n.removeprefix("outcome."): t for n, t in tensors.items() if n.startswith("outcome.")}
        outcomes = {
            name: Outcome(item["step"], item["tokens"], item["clip"], gradients)
            for name, item in values["outcomes"].items()
        }
        state = RunState(values["run_id"], values["next_step"], values["rounds_done"], outcomes)
        state.round_tokens, state.skipped = values["round_tokens"], values.get("skipped", 0)
        aggregated = state.rounds_done - state.skipped
        if aggregated in self._rounds.steps():
            state.result = self._rounds.load(aggregated)[0]
        return state

    def _check_plan(self, values: Mapping[str, Any]) -> None:
        if values["plan_sha256"] == self.plan.sha256():
            return
        fields = "; ".join(differences(self.plan, parse_plan_json(values["plan"])))
        raise ConfigError(
            f"The run in {self.folder} was started with another plan ({fields}; here is the plan file, there the run). "
            "Restore the plan, or give --run a new folder."
        )

    def save(self, engine: Engine, state: RunState) -> None:
        """Make the state after a step durable; call on the engine thread."""
        outcomes = {
            name: {"step": o.step, "tokens": o.num_target_tokens, "clip": o.clip_coefficient}
            for name, o in state.outcomes.items()
        }
        newest = max(state.outcomes.values(), key=lambda outcome: outcome.step, default=None)
        gradients = newest.gradients if newest else {}
        tensors = {f"engine.{name}": tensor for name, tensor in engine.tensors().items()}
        tensors |= {f"outcome.{name}": tensor for name, tensor in gradients.items()}
        values = {
            "run_id": state.run_id,
            "next_step": state.next_step,
            "rounds_done": state.rounds_done,
            "outcomes": outcomes,
            "round_tokens": state.round_tokens,
            "skipped": state.skipped,
            "plan": self.plan.to_json(),
            "plan_sha256": self.plan.sha256(),
        }
        self._checkpoints.save(state.next_step, tensors, values)

    def save_round(self, engine: Engine, state: RunState) -> None:
        """Make a round's aggregate and the trunk that belongs to it durable, then the state that refers to them."""
        prefix = "parameter."
        trunk = {n.removeprefix(prefix): t for n, t in engine.tensors().items() if n.startswith(prefix)}
        self._trunks.save(state.rounds_done, trunk, {"next_step": state.next_step})
        self._rounds.save(state.rounds_done, state.result, {})
        self.save(engine, state)

    def close(self) -> None:
        """Release the run folder."""
        for kept in (self._checkpoints, self._rounds, self._trunks):
            kept.close()
