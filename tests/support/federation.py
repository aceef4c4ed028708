"""A whole federation on loopback, with real identities: its parts on threads of this process, or as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedsea.client import run as client_run
from fedsea.client.setup import ClientOptions
from fedsea.client.trainer import EvaluationReport, StepReport
from fedsea.observe.observers import compose
from fedsea.plan import FederationPlan, load_plan
from fedsea.server import run as server_run
from fedsea.server.run import ServerOptions
from fedsea.server.service import Service
from fedsea.storage import CheckpointStore
from fedsea.wire.identity import Authority, enroll, install
from tests.support.assets import toml, write_silo
from tests.support.processes import Child, Fault, spawn_client, spawn_server

NAMES = ("a", "b", "c", "d")
DEADLINE_S = 60.0

_DEFAULTS: dict[str, dict[str, Any]] = {
    "adapter": {"rank": 4, "alpha": 8.0},
    "optimizer": {"learning_rate": 0.01},
    "training": {"rounds": 2, "steps_per_round": 3, "micro_batch_sequences": 2},
    "data": {"max_tokens": 48, "holdout": 0.2},
}


def make_identities(folder: Path, names: tuple[str, ...]) -> Path:
    """An authority in `ca`, a server in `server`, and a folder for every client."""
    authority = Authority.create(folder / "ca", "test federation")
    authority.issue_server(["127.0.0.1"], folder=folder / "server")
    for name in names:
        certificate = authority.approve(enroll(folder / name, name).csr_pem)
        install(folder / name, certificate.pem, authority.ca_pem, authority.fingerprint)
    return folder


class Watch:
    """An observer that keeps what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.steps: list[StepReport] = []
        self.evaluations: list[EvaluationReport] = []
        self.waits: list[tuple[str, ...]] = []
        self.begun = threading.Event()
        self.trunk: Any = None
        self._news = threading.Condition()

    def loading(self, what: str) -> None:
        self._note(self.loaded, what)

    def begin(self, _plan: FederationPlan, _name: str, trunk: Any) -> None:
        self.trunk = trunk
        self.begun.set()

    def step(self, report: StepReport) -> None:
        self._note(self.steps, report)

    def evaluation(self, report: EvaluationReport) -> None:
        self._note(self.evaluations, report)

    def waiting(self, names: tuple[str, ...]) -> None:
        self._note(self.waits, names)

    def bytes(self, up: int, down: int) -> None:
        """Not kept."""

    def _note(self, where: list[Any], what: Any) -> None:
        with self._news:
            where.append(what)
            self._news.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, DEADLINE_S), "what the test waits for did not come"


class Part(threading.Thread):
    """A server's or client's main call on a thread."""

    def __init__(self, call: Callable[[], Any], name: str) -> None:
        super().__init__(name=f"test-{name}", daemon=True)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.watch = Watch()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
        finally:
            self.watch.begun.set()

    def finish(self) -> Any:
        """Its result; its error is raised here."""
        self.join(DEADLINE_S)
        assert not self.is_alive(), f"{self.name} did not end"
        if self.error is not None:
            raise self.error
        return self.result


class ServerThread(Part):
    """`serve` on a thread; it can be stopped."""

    def __init__(self, options: ServerOptions, recorder: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        super().__init__(self._serve, "server")
        self.options = options
        self._recorder = recorder
        self.ready = threading.Event()
        self.status: dict[str, Any] = {}
        self.service: Service | None = None
        self._loop: Any = None
        self._main: Any = None

    def _serve(self) -> None:
        try:
            server_run.serve(self.options, self._watched)
        except asyncio.CancelledError:
            pass  # by `stop`
        finally:
            self.ready.set()

    def _watched(self, status: dict[str, Any]) -> None:
        self.status = status
        self._recorder(status)
        self.ready.set()

    def stop(self) -> None:
        """As a signal would; clients see a server that is gone."""
        if self.is_alive() and self.service is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._main.cancel)
        self.join(DEADLINE_S)

    def wait_for_client(self, name: str) -> None:
        """Until it takes part. Who starts many clients on threads does this between them: gRPC has been seen to crash
        where one event loop closes its channel while others open theirs, which no real process does.
        """
        assert self.service is not None
        run, pause = self.service.coordinator.run, threading.Event()
        for _ in range(int(DEADLINE_S / 0.01)):
            if name in run.connected or not self.is_alive():
                return
            pause.wait(0.01)
        raise AssertionError(f"{name} did not take part in {DEADLINE_S:g} s")

    def start_and_wait(self) -> str:
        """Its address."""
        thread = self

        class Caught(Service):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                thread.service, thread._loop = self, asyncio.get_running_loop()
                thread._main = asyncio.current_task()

        original, server_run.Service = server_run.Service, Caught  # type: ignore[misc]
        try:
            self.start()
            assert self.ready.wait(DEADLINE_S)
        finally:
            server_run.Service = original  # type: ignore[misc]
        if self.error is not None:
            raise self.error
        assert self.options.ready_file is not None
        return self.options.ready_file.read_text()


class Federation:
    """Folders and settings of one federation.

    Args:
        folder: Of this federation alone.
        model: The base model.
        identities: As made by `make_identities`.
        names: Its clients, in the plan's order.
        plan: Sections to lay over the defaults; `clients` maps a name to what its entry adds.
    """

    def __init__(
        self, folder: Path, model: Path, identities: Path, names: tuple[str, ...], plan: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.identities = identities
        self.names = names
        folder.mkdir(parents=True)
        sections = {key: dict(value) for key, value in _DEFAULTS.items()}
        entries: Mapping[str, Mapping[str, Any]] = {}
        top: dict[str, Any] = {"name": "test", "seed": 5}
        for key, value in plan.items():
            if key == "clients":
                entries = value
            elif isinstance(value, Mapping):
                sections[key] = {**sections.get(key, {}), **value}
            else:
                top[key] = value
        sections["model"] = {"path": str(model), **sections.get("model", {})}
        clients = [{"name": name, **entries.get(name, {})} for name in names]
        self.plan_file = folder / "plan.toml"
        self.plan_file.write_text(toml({**top, **sections, "clients": clients}))
        self.silos = {name: write_silo(folder / f"{name}.jsonl", name) for name in names}
        self.address = "127.0.0.1:0"
        self.server: ServerThread | None = None
        self._children: list[Child] = []

    @property
    def plan(self) -> FederationPlan:
        return load_plan(self.plan_file)

    def server_options(self, **changes: Any) -> ServerOptions:
        values = {
            "plan": self.plan_file,
            "listen": self.address,
            "identity": self.identities / "server",
            "ca": self.identities / "ca",
            "run": self.folder / "server",
            "threads": 1,
            "exit_when_finished": True,
            "ready_file": self.folder / "ready",
        }
        return ServerOptions(**(values | changes))

    def client_options(self, name: str, **changes: Any) -> ClientOptions:
        values = {
            "server": self.address,
            "identity": self.identities / name,
            "data": (self.silos[name],),
            "run": self.folder / name,
            "threads": 1,
            "evaluate": False,
            "retry_for_s": 60.0,
        }
        return ClientOptions(**(values | changes))

    # --- on threads -------------------------------------------------------------------------------------------------

    def start_server(self, recorder: Callable[[dict[str, Any]], None] = lambda _: None, **changes: Any) -> ServerThread:
        """A server on a thread; a later one takes the same port."""
        self.server = ServerThread(self.server_options(**changes), recorder)
        self.address = self.server.start_and_wait()
        return self.server

    def start_client(self, name: str, *observers: Any, **changes: Any) -> Part:
        """A client on a thread; back when its model is loaded, for loading patches torch and bears no second thread."""
        options = self.client_options(name, **changes)
        part = Part(lambda: client_run.train(options, compose(part.watch, *observers)), name)
        part.start()
        assert part.watch.begun.wait(DEADLINE_S)
        return part

    def train(self, **changes: Any) -> dict[str, Part]:
        """Run everything to its end."""
        server = self.start_server()
        parts = {name: self.start_client(name, **changes) for name in self.names}
        for part in (*parts.values(), server):
            part.finish()
        return parts

    # --- as processes -----------------------------------------------------------------------------------------------

    def spawn_server(self, *faults: Fault) -> Child:
        """A server process, ready for clients; a later one takes the same port."""
        child = spawn_server(self.server_options(), faults)
        self._children.append(child)
        self.address = child.wait_for("ready")
        return child

    def spawn_client(self, name: str, *faults: Fault, **changes: Any) -> Child:
        child = spawn_client(self.client_options(name, **changes), faults)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End whatever still runs."""
        for child in self._children:
            child.end()
        if self.server is not None:
            self.server.stop()

    # --- what stays -------------------------------------------------------------------------------------------------

    def durable(self) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """Newest checkpoint of the server (and its last round) and of every client, without the run's random name."""
        folders = {
            "server": self.folder / "server" / "checkpoints",
            "rounds": self.folder / "server" / "rounds",
            **{name: self.folder / name / "checkpoints" for name in self.names},
        }
        found = {}
        for who, folder in folders.items():
            latest = CheckpointStore(folder, read_only=True).latest()
            if latest is not None:
                _, tensors, state = latest
                found[who] = ({n: t.clone() for n, t in tensors.items()}, {**state, "run_id": ""})
        return found

    def parameters(self) -> dict[str, torch.Tensor]:
        """Trained parameters at the end, of all parties; later clients win where names are shared."""
        found: dict[str, torch.Tensor] = {}
        for who, (tensors, _) in self.durable().items():
            prefix = "engine.parameter." if who == "server" else "parameter."
            found |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return found


def assert_same_bits(got: Federation, expected: Federation) -> None:
    """Every durable tensor and state is the same, bit for bit."""
    ours, theirs = got.durable(), expected.durable()
    assert ours.keys() == theirs.keys()
    for who in theirs:
        assert json.dumps(ours[who][1], sort_keys=True) == json.dumps(theirs[who][1], sort_keys=True), who
        assert ours[who][0].keys() == theirs[who][0].keys(), who
        differing = [n for n, t in theirs[who][0].items() if not torch.equal(t, ours[who][0][n])]
        assert not differing, f"{len(differing)} tensors of {who} differ, the first is {differing[0]}"
