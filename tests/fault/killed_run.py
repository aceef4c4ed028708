"""Ten `fedsea train` processes and a server, a client and the server killed once each, against the undisturbed run.

The suite kills at chosen points in small runs (`test_killed.py`). This is the same from outside, at length, with the
commands that people type; about ten minutes on two cores:

    python -m tests.fault.killed_run MODEL SILO.jsonl SILO.jsonl …

Ends with exit code 1 if a process fails or a tensor differs by a bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedsea.observe.run_log import read_lines
from tests.support.federation import make_identities

PLAN = """
[model]
path = {model}
[partition]
input_blocks = 1
output_blocks = 1
[adapter]
rank = 8
alpha = 16.0
dropout = 0.05
[optimizer]
learning_rate = 0.002
[training]
mode = "batched"
wait = "all"
rounds = {rounds}
steps_per_round = {steps}
micro_batch_sequences = 2
[data]
max_tokens = 128
holdout = 0.05
"""
ROUNDS = 10
WAIT_S = 3600.0


class Run:
    """One run of the federation, in a folder of its own; a process that was killed is started again by `start`."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self._args = args
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._names = [f"client-{number}" for number in range(len(args.silos))]
        folder.mkdir()
        self._identities = make_identities(folder / "identities", tuple(self._names))
        shape = PLAN.format(model=repr(str(args.model)), rounds=ROUNDS, steps=args.steps // ROUNDS)
        clients = "".join(f'[[clients]]\nname = "{name}"\n' for name in self._names)
        (folder / "plan.toml").write_text(shape + clients)

    def start(self, name: str, port: str = "0") -> None:
        """Start the server or a client as a command."""
        run = str(self.folder / "runs" / name)
        if name == "server":
            ready = self.folder / "address"
            ready.unlink(missing_ok=True)
            listen = ("--listen", f"127.0.0.1:{port}", "--ready-file", str(ready), "--metrics", "off")
            identity = ("--identity", str(self._identities / "server"), "--ca", str(self._identities / "ca"))
            command = ("server", "--plan", str(self.folder / "plan.toml"), *listen, *identity)
        else:
            silo = self._args.silos[self._names.index(name)]
            connection = ("--server", self.address(), "--identity", str(self._identities / name))
            command = ("train", *connection, "--data", str(silo), "--model", str(self._args.model), "--no-eval")
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedsea", *command, "--run", run, "--threads", "1", "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def address(self) -> str:
        """The server's, once it listens."""
        ready = self.folder / "address"
        self._until(ready.exists)
        return ready.read_text()

    def step(self, name: str = "client-0") -> int:
        """How many steps a client has logged."""
        metrics = self.folder / "runs" / name / "metrics.jsonl"
        return sum(line["kind"] == "step" for line in read_lines(metrics)) if metrics.exists() else 0

    def kill_and_start_again(self, name: str, step: int) -> None:
        """SIGKILL after so many steps."""
        self._until(lambda: self.step() >= step)
        port = self.address().rpartition(":")[2]
        self._running[name].send_signal(signal.SIGKILL)
        self._running[name].wait()
        print(f"{name} killed after {self.step()} steps", flush=True)
        self.start(name, port)

    def go(self, kills: tuple[tuple[str, int], ...]) -> dict[str, torch.Tensor]:
        """The whole run; every tensor that the checkpoints of server and clients end with."""
        begun = time.monotonic()
        self.start("server")
        for name in self._names:
            self.start(name)
        try:
            for name, step in kills:
                self.kill_and_start_again(name, step)
            self._until(lambda: all(self._running[name].poll() is not None for name in self._names))
        finally:
            for process in self._running.values():
                process.terminate()
            codes = {name: process.wait() for name, process in self._running.items()}
        seconds = time.monotonic() - begun
        print(f"{self.folder.name}: {self.step()} steps, {seconds:.0f} s, exit codes {codes}", flush=True)
        return self._tensors()

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            for name, process in self._running.items():
                if process.poll() not in (None, 0):
                    log = (self.folder / f"{name}.log").read_text()
                    raise SystemExit(f"{name} ended with {process.returncode}:\n{log}")
            if time.monotonic() > deadline:
                raise SystemExit(f"Nothing happened for {WAIT_S:g} s; see {self.folder}.")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running["server"].wait(0.2)

    def _tensors(self) -> dict[str, torch.Tensor]:
        runs, found = self.folder / "runs", {}
        for file in sorted(runs.rglob("*.safetensors")):
            tensors = load_file(file)
            found |= {f"{file.relative_to(runs)} {name}": tensor for name, tensor in tensors.items()}
        return found


def main() -> int:
    """Both runs and their comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda path: Path(path).resolve())
    parser.add_argument("silos", type=lambda path: Path(path).resolve(), nargs="+", help="one for every client")
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {ROUNDS}")
    parser.add_argument("--keep", type=Path, help="a new folder for both runs, instead of a temporary one")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="fedsea-killed-"))
    folder.mkdir(exist_ok=True)
    kills = (("client-3", args.steps // 4), ("server", args.steps * 5 // 8))
    disturbed = Run(folder / "disturbed", args).go(kills)
    undisturbed = Run(folder / "undisturbed", args).go(())
    unlike = [
        name
        for name in sorted(disturbed.keys() | undisturbed.keys())
        if name not in disturbed or name not in undisturbed or not torch.equal(disturbed[name], undisturbed[name])
    ]
    print(f"{len(undisturbed)} tensors of the undisturbed run, {len(unlike)} that differ: {unlike[:5]}")
    if not args.keep:
        shutil.rmtree(folder)
    return 1 if unlike or not undisturbed else 0


if __name__ == "__main__":
    sys.exit(main())
