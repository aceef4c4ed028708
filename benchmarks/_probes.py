"""Time inside a process: wraps functions of fedsea in this process, so that nothing in fedsea knows of benchmarks."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil


class Probes:
    """Wall and CPU seconds by phase, of the thread that ran it; phases inside phases count in both."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Replace a method by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, name)
        cell = self._seconds[phase]

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                cell[0] += time.perf_counter() - wall
                cell[1] += time.thread_time() - cpu
                cell[2] += 1

        setattr(owner, name, timed)

    def totals(self) -> dict[str, tuple[float, float, int]]:
        """Phase to wall seconds, CPU seconds and calls so far."""
        return {phase: (wall, cpu, int(calls)) for phase, (wall, cpu, calls) in self._seconds.items()}


def server_probes() -> Probes:
    """Phases of a server's step."""
    from fedsea.model.passes import TrunkPasses
    from fedsea.server.engine import Engine
    from fedsea.server.state import ServerStore
    from fedsea.wire.encoding import Decoder, Encoder

    probes = Probes()
    probes.wrap(TrunkPasses, "forward", "server_forward")
    probes.wrap(TrunkPasses, "backward", "server_backward")
    probes.wrap(Engine, "finish", "server_optimizer")
    probes.wrap(ServerStore, "save", "server_save")
    probes.wrap(Encoder, "encode", "server_encode")
    probes.wrap(Decoder, "feed", "server_decode")
    return probes


def client_probes() -> Probes:
    """Phases of a client's step; "seal" makes a tensor's bytes, "encode" the messages around them."""
    from fedsea.client.segments import ClientSegments
    from fedsea.client.state import ClientStore
    from fedsea.data.batches import BatchStream
    from fedsea.privacy.boundary import Boundary
    from fedsea.wire.encoding import Decoder, Encoder

    probes = Probes()
    probes.wrap(ClientSegments, "embed", "client_embed")
    probes.wrap(ClientSegments, "head", "client_head")
    probes.wrap(ClientSegments, "apply", "client_optimizer")
    probes.wrap(ClientStore, "prepare", "client_prepare")
    probes.wrap(ClientStore, "save", "client_save")
    probes.wrap(BatchStream, "next", "client_data")
    probes.wrap(Boundary, "hidden", "client_boundary")
    probes.wrap(Boundary, "gradient", "client_boundary")
    probes.wrap(Encoder, "seal", "client_seal")
    probes.wrap(Encoder, "encode", "client_encode")
    probes.wrap(Decoder, "feed", "client_decode")
    return probes


def cpu_seconds(pid: int) -> float:
    """CPU time (user and system) that a process and its children have used.

    On Linux the process's own clock is read, to the nanosecond; elsewhere, what psutil knows.
    """
    return sum(map(_own_cpu_seconds, [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]))


def _own_cpu_seconds(pid: int) -> float:
    if psutil.LINUX:
        return time.clock_gettime((~pid << 3) | 2)  # the clock of another process, as clock_getcpuclockid(3) gives it
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
