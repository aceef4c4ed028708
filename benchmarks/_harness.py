"""What all benchmarks share: real processes with real certificates on the loopback, and the line of JSON at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import _worker
import psutil
from _inputs import Shape, write_model
from _probes import cpu_seconds

from fedsea.evaluation.processes import apart, make_context

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; processes take it from here
HERE = Path(__file__).parent
_CONTEXT = make_context()
_ANSWER_S = 900.0
_END_S = 60.0
_LOG_TAIL = 3000


# --- the result -------------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest shape and shortest run, for CI")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every process")
    parser.add_argument("--out", help="also write the result to benchmarks/results/<OUT>.json")
    return parser


def finish(benchmark: str, settings: Mapping[str, Any], figures: Mapping[str, Any], out: str | None) -> None:
    """Print the result as the last line, and keep it if asked for."""
    result = {
        "benchmark": benchmark,
        "commit": _commit(),
        "machine": machine(),
        "settings": settings,
        "figures": rounded(figures),
    }
    if out:
        path = HERE / "results" / f"{out.removesuffix('.json')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def rounded(value: Any) -> Any:
    """Floats to four significant digits, in any nesting."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout

    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", "../src", "."))
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+changes" if changed else "")


def machine() -> dict[str, Any]:
    """What the figures depend on; the load says whether anything else was running."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),  # from what is installed: some benchmarks import neither
        "transformers": version("transformers"),
        "load_1min": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- processes --------------------------------------------------------------------------------------------------------


class Worker:
    """A process of `_worker.py`; killed when its context is left, with the end of its log shown if that is an error.

    Args:
        role: Function of `_worker.py`.
        settings: Its argument.
        log: File for what it prints.
        threads: CPU threads.
    """

    def __init__(self, role: str, settings: Mapping[str, Any], log: Path, threads: int) -> None:
        self.role = role
        self._log = log
        log.touch()
        self._connection, theirs = _CONTEXT.Pipe()
        # mypy: every context has it but the base class.
        process = _CONTEXT.Process(target=_worker.work, args=(role, {"threads": threads, **settings}, theirs, str(log)))  # type: ignore[attr-defined]
        with apart():
            process.start()
        theirs.close()
        self._process: BaseProcess = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not KeyboardInterrupt:
            text = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
            print(f"--- log of {self.role} ---\n{text}", file=sys.stderr)
        self._process.kill()
        self._process.join()
        self._connection.close()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far."""
        assert self._process.pid is not None
        return cpu_seconds(self._process.pid)

    def order(self, what: object) -> None:
        """Send an order; anything that JSON can say but null."""
        self._connection.send_bytes(json.dumps(what).encode())

    def answer(self, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        """The next one.

        Raises:
            RuntimeError: It ended instead, or said nothing in time.
        """
        if not self._connection.poll(timeout_s):
            raise RuntimeError(f"The {self.role} process said nothing in {timeout_s:g} s.")
        try:
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except EOFError as error:
            self._process.join()
            raise RuntimeError(f"The {self.role} process ended with code {self._process.exitcode}.") from error
        return answer

    def ask(self, what: object = "figures") -> dict[str, Any]:
        """Send an order and wait for the answer."""
        self.order(what)
        return self.answer()

    def release(self) -> None:
        """No more orders: it may finish by itself."""
        self._connection.close()

    def wait(self) -> None:
        """Until it has ended.

        Raises:
            RuntimeError: It failed, or has not ended in time.
        """
        self._process.join(_END_S)
        if self._process.exitcode != 0:
            raise RuntimeError(f"The {self.role} process ended with code {self._process.exitcode}.")


def end(*workers: Worker) -> None:
    """Let workers that may wait for each other finish in good order.

    Raises:
        RuntimeError: One failed.
    """
    for worker in workers:
        worker.release()
    for worker in workers:
        worker.wait()


# --- a federation -----------------------------------------------------------------------------------------------------


class Workspace:
    """A temporary folder with a model, an authority, and whoever is enrolled.

    Args:
        root: The folder.
        shape: Of the model, or the folder of a model that exists.
        threads: CPU threads of every process.
        dtype: Of the weights that are made.
        device: Where they are made.
    """

    def __init__(
        self, root: Path, shape: Shape | Path, threads: int, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        from fedsea.wire.identity.authority import Authority

        self.root = root
        self.threads = threads
        self._authority = Authority.create(root / "ca", "benchmark")
        self._authority.issue_server(["127.0.0.1", "localhost"], folder=root / "server")
        self._stack = contextlib.ExitStack()
        self._count = 0
        self.model = shape.resolve() if isinstance(shape, Path) else root / "model"
        if isinstance(shape, Shape):
            write_model(self.model, shape, dtype=dtype, device=device)

    def enroll(self, name: str) -> None:
        """Give a client its certificate."""
        from fedsea.wire.identity import enrollment

        folder = self.root / name / "identity"
        request = enrollment.enroll(folder, name)
        certificate = self._authority.approve(request.csr_pem)
        ca_pem = (self.root / "ca" / "ca.pem").read_bytes()
        enrollment.install(folder, certificate.pem, ca_pem, self._authority.fingerprint)

    def data(self, name: str) -> Path:
        """Where a client's silo belongs."""
        return self.root / name / "rows.jsonl"

    def write_plan(self, sections: Mapping[str, Mapping[str, Any]], clients: Sequence[str]) -> Path:
        """A plan over this workspace's model; JSON's values are TOML's here."""
        lines = []
        for section, values in {"model": {}, **sections}.items():
            own = {"path": str(self.model)} if section == "model" else {}
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in {**own, **values}.items())]
        for name in clients:
            lines += ["[[clients]]", f"name = {json.dumps(name)}"]
        path = self._fresh("plan", ".toml")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _fresh(self, what: str, ending: str = "") -> Path:
        self._count += 1
        return self.root / f"{what}-{self._count}{ending}"

    def start(self, role: str, threads: int | None = None, **settings: Any) -> Worker:
        """A process; usually entered as a context at once."""
        return Worker(role, settings, self._fresh(role, ".log"), threads or self.threads)

    @contextlib.contextmanager
    def server(
        self, plan: Path, threads: int | None = None, *, device: str = "cpu", probes: bool = True
    ) -> Iterator[tuple[Worker, str]]:
        """A running server and its address; asked anything, it tells its probes and its status."""
        ready = self._fresh("ready")
        settings = {
            "root": str(self.root),
            "plan": str(plan),
            "run": str(self._fresh("run")),
            "ready": str(ready),
            "device": device,
            "probes": probes,
        }
        with self.start("server", threads, **settings) as worker:
            yield worker, _address(ready, worker)

    def decoder(self, name: str, address: str, *, device: str = "cpu") -> Worker:
        """A client that decodes what it is told; its first answer says that it is ready."""
        return self.start(
            "split_decoder",
            server=address,
            identity=str(self.root / name / "identity"),
            run=str(self._fresh(f"run-{name}")),
            device=device,
        )

    def client(self, name: str, address: str, *, own_machine: bool = False) -> Worker:
        """A client that waits for orders; its first answer says that it is ready.

        Args:
            name: Enrolled, and with data.
            address: Of the server, or of a link to it.
            own_machine: It stands for a machine of its own, see `_replay.py`.
        """
        return self.start(
            "client",
            server=address,
            identity=str(self.root / name / "identity"),
            data=str(self.data(name)),
            run=str(self._fresh(f"run-{name}")),
            own_machine=own_machine,
        )


def _address(ready: Path, worker: Worker) -> str:
    deadline = time.monotonic() + 120.0
    while not ready.exists():
        if time.monotonic() > deadline or not worker.alive:
            raise RuntimeError("The server did not start.")
        time.sleep(0.05)
    return ready.read_text(encoding="utf-8")


@contextlib.contextmanager
def workspace(shape: Shape | Path, threads: int, dtype: str = "float32", device: str = "cpu") -> Iterator[Workspace]:
    """A workspace in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fedsea-benchmark-") as folder:
        yield Workspace(Path(folder), shape, threads, dtype, device)


def difference(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Probes of a window: totals at its end minus totals at its beginning."""
    zeros = [0.0, 0.0, 0]
    return {k: [a - b for a, b in zip(v, before.get(k, zeros), strict=True)] for k, v in after.items()}
