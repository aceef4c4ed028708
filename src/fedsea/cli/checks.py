"""The checks of `fedsea doctor` that look at this machine alone."""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from fedsea.errors import FedseaError
from fedsea.observe.figures import bytes_text

State = Literal["ok", "warn", "fail"]

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "grpcio", "protobuf", "cryptography", "pydantic")
_LEAST_FREE_BYTES = 2_000_000_000
_LEAST_FREE_MEMORY = 1_000_000_000
_SLOW_FSYNC_S = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table.

    Attributes:
        found: What was found.
        advice: What to do about it; empty if nothing.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def attempt(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """Run a check; an error that fedsea raises on purpose is its finding, and says itself what to do."""
    try:
        return check()
    except FedseaError as error:
        return [Check(name, "fail", error.message)]


def python() -> Check:
    """Version of Python."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", "ok", found)


def packages() -> list[Check]:
    """Versions of the packages that matter, against what fedsea asks for."""
    wanted = _requirements()
    return [_package(name, wanted.get(name, "")) for name in _PACKAGES]


def _requirements() -> dict[str, str]:
    found = {}
    for line in metadata.requires("fedsea") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([<>=!~][^;]*)?(;.*)?$", line)
        if match and not match[3]:
            found[match[1].lower()] = (match[2] or "").replace(" ", "")
    return found


def _package(name: str, wanted: str) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install '{name}{wanted}'")
    if not satisfies(found, wanted):
        return Check(name, "fail", f"{found}, but fedsea needs {wanted}", f"pip install '{name}{wanted}'")
    return Check(name, "ok", found)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is inside a range like ">=2.9,<2.14"; other operators are not looked at.

    >>> satisfies("2.13.0+cpu", ">=2.9,<2.14"), satisfies("2.14.1", ">=2.9,<2.14"), satisfies("2.8", ">=2.9")
    (True, False, False)
    """
    number = _numbers(version)
    for operator, bound in re.findall(r"(>=|<)([0-9.]+)", wanted):
        limit = _numbers(bound)
        if (operator == ">=" and number < limit) or (operator == "<" and number >= limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def machine() -> Check:
    """Cores and memory."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} cores, {bytes_text(memory.available)} of {bytes_text(memory.total)} memory free"
    if memory.available < _LEAST_FREE_MEMORY:
        least = bytes_text(_LEAST_FREE_MEMORY)
        return Check("machine", "warn", found, f"less than {least} of memory is free: end other programs")
    return Check("machine", "ok", found)


def gpu() -> Check:
    """CUDA devices as torch sees them; torch, which takes seconds to load, is not asked where none can be."""
    if sys.platform == "linux" and not any(_may_be_gpu(path.name) for path in Path("/dev").iterdir()):
        return Check("gpu", "ok", "none; the CPU is used")
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "ok", "none; the CPU is used")
    names = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}, {bytes_text(torch.cuda.mem_get_info(index)[0])} free"
        for index in range(torch.cuda.device_count())
    ]
    return Check("gpu", "ok", "; ".join(names))


def _may_be_gpu(device: str) -> bool:
    return device.startswith("nvidia") or device in ("dxg", "kfd")


def disk(folder: Path) -> Check:
    """Free space and the time of an fsync where runs are kept."""
    import shutil

    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    try:
        seconds = _fsync_seconds(there)
    except OSError as error:
        return Check(
            "disk", "fail", f"{there} cannot be written ({error.strerror})", "choose another folder with --run"
        )
    found = f"{bytes_text(free)} free, {seconds * 1000:.1f} ms to make a write durable, in {there}"
    if free < _LEAST_FREE_BYTES:
        return Check("disk", "warn", found, "free some space: checkpoints and logs need it")
    if seconds > _SLOW_FSYNC_S:
        return Check("disk", "warn", found, "every step waits for the disk: choose a local disk with --run")
    return Check("disk", "ok", found)


def _fsync_seconds(folder: Path) -> float:
    taken = []
    with tempfile.NamedTemporaryFile(prefix=".fedsea-doctor-", dir=folder) as file:
        for _ in range(5):
            start = time.perf_counter()
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)
