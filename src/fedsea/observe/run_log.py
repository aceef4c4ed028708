"""What a run leaves in its folder: `metrics.jsonl`, `tensorboard/`, `plan.json`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsea.plan import FederationPlan
from fedsea.storage import storage_error, write_bytes_atomic

MAX_STRING = 200
"""Names and states are short; what is longer is no metric, and might be somebody's text."""

Value = float | int | str | bool | None


class RunLog:
    """The metrics of a run folder; appends to what an earlier process of the same run wrote.

    Args:
        folder: Run folder; made if absent.
        tensorboard: Also write scalars to `tensorboard/`.
        clock: Seconds since the epoch.

    Raises:
        StorageError: The folder cannot be written.
    """

    def __init__(self, folder: Path, tensorboard: bool = True, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self._path)
            self._file = self._path.open("ab", buffering=0)
            self._scalars = _ScalarFile(folder / "tensorboard", clock()) if tensorboard else None
        except OSError as error:
            raise storage_error("write", self._path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        self._file.close()
        if self._scalars is not None:
            self._scalars.close()

    def write(self, kind: str, **values: Value) -> None:
        """Append one line, durable against a kill of this process.

        Args:
            kind: What the line is about: "step", "evaluation", "round", …
            values: Numbers and short strings. A number under "step" (or "next_step") is the line's place in
                TensorBoard. A number that is not finite becomes null.

        Raises:
            StorageError: The disk is full or gone.
        """
        assert all(len(v) <= MAX_STRING for v in values.values() if isinstance(v, str)), "a metric is no text"
        now = self._clock()
        clean = {key: _finite(value) for key, value in values.items()}
        line = json.dumps({"time": round(now, 3), "kind": kind, **clean}, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            if self._scalars is not None:
                self._scalars.write(now, kind, clean)
        except OSError as error:
            raise storage_error("write", self._path, error) from None

    def write_plan(self, plan: FederationPlan) -> None:
        """Write the resolved plan, defaults and all, to `plan.json`.

        Raises:
            StorageError: The disk refused.
        """
        write_bytes_atomic(self.folder / "plan.json", (plan.model_dump_json(indent=2) + "\n").encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line is left out.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise storage_error("read", path, error) from None
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Remove what a killed process left behind the last line break."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            if (found := file.read(keep - start).rfind(b"\n")) >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


class _ScalarFile:
    """TensorBoard's event file, written directly: no thread, and no search for TensorFlow."""

    def __init__(self, folder: Path, now: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{int(now):010d}.fedsea.{os.getpid()}"
        self._event = Event
        self._file = path.open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())

    def write(self, now: float, kind: str, values: dict[str, Value]) -> None:
        step = values.get("step", values.get("next_step"))
        if not isinstance(step, int):
            return
        event = self._event(wall_time=now, step=step)
        for key, value in values.items():
            if key not in ("step", "next_step") and isinstance(value, int | float) and not isinstance(value, bool):
                event.summary.value.add(tag=f"{kind}/{key}", simple_value=value)
        if event.summary.value:
            self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()
