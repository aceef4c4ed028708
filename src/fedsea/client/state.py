"""What a client must not forget, and how it is kept on disk.

Two files: the checkpoint after the last applied step, and, while a step is being agreed on, its *prepared*
gradients. A client tells the server that it is ready only when the latter are durable; killed in between, it
asks for the outcome and applies them, or learns that the step is to be done again.

Because the prepared gradients outlive a kill, the checkpoint after a step is written beside the next step's
computation: it has to be durable only before the next gradients take the place of the ones that it contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from fedsea.client.run_key import RunKey
from fedsea.client.trunk import Standing
from fedsea.data.formats import DataFormat
from fedsea.data.opening import files_sha256
from fedsea.data.silo import Silo
from fedsea.errors import DataError, StorageError
from fedsea.plan import FederationPlan
from fedsea.storage import CheckpointStore, load_tensors, remove_durably, save_tensors, write_bytes_atomic

Tensors = Mapping[str, torch.Tensor]

_SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class ClientState:
    """Where a client stands.

    Attributes:
        next_step: First step of the run that is not applied here yet.
        updates: Steps that this client took part in; seeds its randomness.
        rounds_done: Rounds whose aggregate is applied here.
        round_tokens: Target tokens trained on since the last aggregate.
        data: Position in the data, as `BatchStream.state()`.
    """

    next_step: int = 0
    updates: int = 0
    rounds_done: int = 0
    round_tokens: int = 0
    data: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataNote:
    """What a run is trained on, as its folder remembers it from the first checkpoint on.

    Attributes:
        files_sha256: As `data.opening.files_sha256` gives it; "" where nothing is known.
        num_rows: Good rows in the files, as they were read.
        rows_sha256: Of which rows these are; "" in a note of a version that did not tell.
    """

    files_sha256: str = ""
    num_rows: int = 0
    rows_sha256: str = ""

    @classmethod
    def of(cls, files: Sequence[Path], silo: Silo) -> Self:
        """Of files that were opened as `silo`."""
        return cls(files_sha256(files), silo.num_rows, silo.index.sha256())

    def means(self, other: DataNote) -> bool:
        """Whether a row's number means the same row in both, as far as both tell."""
        ours, theirs = self.rows_sha256, other.rows_sha256
        same_rows = self.num_rows == other.num_rows and (ours == theirs or not ours or not theirs)
        return self.files_sha256 == other.files_sha256 and same_rows


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step's own gradients (of the summed loss), durable before the server is told.

    Attributes:
        data: Position in the data after this step.
        updates: `ClientState.updates` that it follows; -1 in a file of a version that did not note it.
    """

    step: int
    num_target_tokens: int
    squared_norm: float
    mean_loss: float
    data: Mapping[str, int]
    gradients: Tensors
    updates: int = -1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a finished run of a client ended, as its folder says.

    Attributes:
        standing: What a server is told.
        summary: As given to `ClientStore.finish`.
        data_sha256: What identifies the silo's files; "" in a note that does not say.
    """

    run_id: str
    plan_sha256: str
    client: str
    standing: Standing
    summary: Mapping[str, Any]
    data_sha256: str = ""

    def belongs_to(self, key: RunKey) -> bool:
        """Whether it was this run."""
        return (self.run_id, self.plan_sha256, self.client) == (key.run_id, key.plan.sha256(), key.client)


class ClientStore:
    """A client's run folder: `checkpoints/`, `prepared.safetensors`, and at the end `summary.json`.

    Args:
        folder: Run folder; made if absent; locked for this process.
        plan: The plan as fetched; compared with the one that the folder was made with.
        run_id: Identity of the server's run.
        client: Name of the client; a folder of another one is refused.
        data_format: How the silo's rows were said to be read, for whoever uses the run later.
        data: What it trains on; a folder that was trained on other files is refused.
    """

    def __init__(
        self,
        folder: Path,
        plan: FederationPlan,
        run_id: str,
        client: str = "",
        data_format: DataFormat = DataFormat(),  # noqa: B008 (frozen)
        data: DataNote = DataNote(),
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.key = RunKey(plan, run_id, client)
        self._data_format = data_format
        self._data = data
        self._checkpoints = CheckpointStore(folder / "checkpoints", keep=plan.durability.keep)
        for leftover in (*folder.glob(".prepared.safetensors.*.tmp"), *folder.glob(f".{_SUMMARY}.*.tmp")):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
        self._prepared_path = folder / "prepared.safetensors"
        self._writer = ThreadPoolExecutor(1, "fedsea-checkpoint")
        self._writing: Future[None] | None = None
        self.state = ClientState()
        self.prepared: Prepared | None = None

    @staticmethod
    def peek(folder: Path) -> Tensors | None:
        """The newest checkpoint's tensors, without locking the folder; None if there is none."""
        found = CheckpointStore(folder / "checkpoints", read_only=True).latest()
        return None if found is None else found[1]

    @staticmethod
    def look(folder: Path, key: RunKey) -> tuple[ClientState, Tensors] | None:
        """Like `peek`, of a run that is known: where it stands, and its tensors.

        Raises:
            ConfigError: The folder belongs to another run, plan or client.
        """
        found = CheckpointStore(folder / "checkpoints", read_only=True).latest()
        if found is None:
            return None
        _, tensors, values = found
        key.check(folder, values, "Give --run the folder of this client's `fedsea train` with this server.")
        return ClientState(**values["state"]), tensors

    @staticmethod
    def format_of(folder: Path) -> DataFormat:
        """How the run in a folder was told to read its rows; "auto" if it was not, or there is no run."""
        found = CheckpointStore(folder / "checkpoints", read_only=True).latest()
        return DataFormat(**({} if found is None else found[2].get("data_format", {})))

    @staticmethod
    def data_of(folder: Path) -> DataNote:
        """What the run in a folder is trained on; nothing is known of one of an earlier version."""
        found = CheckpointStore(folder / "checkpoints", read_only=True).latest()
        return DataNote(**({} if found is None else found[2].get("data", {})))

    @staticmethod
    def ended(folder: Path) -> Ended | None:
        """How the run in a folder ended; None if it did not, or the note of it cannot be read."""
        try:
            values = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
            standing = Standing(values.pop("next_step"), -1, values.pop("rounds_done"))
            return Ended(**values, standing=standing)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def check(self) -> None:
        """Refuse the folder of another run or plan, or of other data, before anything is loaded for it.

        Raises:
            ConfigError: Says what differs.
            DataError: The run was trained on other files.
            StorageError: A file is damaged.
        """
        self._newest()

    def _newest(self) -> tuple[Tensors, Mapping[str, Any]] | None:
        found = self._checkpoints.latest()
        if found is None:
            return None
        _, tensors, values = found
        self.key.check(self.folder, values, "Give --run a new folder to take part in the run of today.")
        before, now = DataNote(**values.get("data", {})).files_sha256, self._data.files_sha256
        if before and now and before != now:
            raise DataError(
                f"The run in {self.folder} was started with other data files, or with these in another order or before "
                "they were changed: put the files of the interrupted run back, or give --run a new folder."
            )
        return tensors, values

    def restore(self) -> Tensors | None:
        """Read the newest checkpoint and the prepared step, if any.

        Returns:
            The tensors given to `save`, or None in a new folder.

        Raises:
            ConfigError: The folder belongs to another run or plan.
            DataError: The run was trained on other files.
            StorageError: A file is damaged, or the prepared step does not follow the newest checkpoint.
        """
        found = self._newest()
        if found is None:
            return None
        tensors, values = found
        self.state = ClientState(**values["state"])
        if self._prepared_path.exists():
            gradients, item = load_tensors(self._prepared_path)
            if item["step"] >= self.state.next_step:
                self.prepared = self._following(Prepared(**item, gradients=gradients))
        return tensors

    def _following(self, prepared: Prepared) -> Prepared:
        """The same, if the steps that this client took part in before it are all in the restored checkpoint.

        Otherwise its outcome would be applied here without theirs, and nobody would know.
        """
        if prepared.updates in (-1, self.state.updates):
            return prepared
        raise StorageError(
            f"The newest checkpoint in {self._checkpoints.folder} contains {self.state.updates} steps of this client, "
            f"and {self._prepared_path} was made after {prepared.updates}: what lies between is missing. Restore a "
            "backup of this run folder that is as new as the run; where training.wait in the plan is a number of "
            f"seconds, you may remove {self._prepared_path.name} instead to go on without these steps."
        )

    def save(self, state: ClientState, tensors: Tensors) -> None:
        """Make the state after a step or round durable, in the background; `flush` waits for it.

        Args:
            state: Where the client stands.
            tensors: Not to be changed until `flush`, or the next `prepare` or `save`.

        Raises:
            StorageError: The disk refused this one, or the one before.
        """
        self.flush()
        values = {
            "state": asdict(state),
            "run_id": self.key.run_id,
            "client": self.key.client,
            "data_format": {"name": self._data_format.name, "fields": dict(self._data_format.fields)},
            "data": asdict(self._data),
            "plan": self.plan.to_json(),
            "plan_sha256": self.plan.sha256(),
        }
        self._writing = self._writer.submit(self._checkpoints.save, state.next_step, tensors, values)
        self.state = state
        if self.prepared is not None and self.prepared.step < state.next_step:
            self.prepared = None

    def prepare(self, prepared: Prepared) -> None:
        """Make a step's own gradients durable.

        Raises:
            StorageError: The disk refused.
        """
        self.flush()
        item = asdict(replace(prepared, gradients={}))
        del item["gradients"]
        save_tensors(self._prepared_path, prepared.gradients, item)
        self.prepared = prepared

    def discard_prepared(self) -> None:
        """The step is to be done again."""
        remove_durably(self._prepared_path)
        self.prepared = None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Keep how the run ended, so that the same command has an answer when it is given again.

        Args:
            summary: Anything that `json` can write.

        Raises:
            StorageError: The disk refused.
        """
        self.flush()
        values = {
            "run_id": self.key.run_id,
            "plan_sha256": self.plan.sha256(),
            "client": self.key.client,
            "next_step": self.state.next_step,
            "rounds_done": self.state.rounds_done,
            "summary": dict(summary),
            "data_sha256": self._data.files_sha256,
        }
        write_bytes_atomic(self.folder / _SUMMARY, (json.dumps(values, indent=2) + "\n").encode())

    @property
    def standing(self) -> Standing:
        """What the server needs to know at a (re)connection; from any thread.

        The trainer may go on meanwhile. `save` replaces the state first and forgets the prepared step then: in the
        opposite order of reading, a step is never missing from both.
        """
        prepared = self.prepared
        state = self.state
        return Standing(state.next_step, -1 if prepared is None else prepared.step, state.rounds_done)

    def flush(self) -> None:
        """Wait until the last `save` is durable.

        Raises:
            StorageError: The disk refused it.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Release the run folder, when what was saved is durable or has failed."""
        self._writer.shutdown()
        self._checkpoints.close()
