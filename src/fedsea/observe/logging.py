"""Logging for the `fedsea` command. Library modules only call `logging.getLogger(__name__)`."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedsea.observe.terminal import folded

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str, json: bool = False) -> None:
    """Send the log to stderr; called once, by the command.

    Args:
        level: One of `LEVELS`, for fedsea's own loggers; other libraries are heard from "warning" on.
        json: One JSON object a line instead of plain lines.
    """
    chosen = getattr(logging, level.upper())
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter(chosen) if json else _PlainFormatter(chosen))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(max(chosen, logging.WARNING))
    logging.getLogger("fedsea").setLevel(chosen)
    logging.captureWarnings(True)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` at every line: a live display redirects it while it runs."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError("this handler follows sys.stderr")


class _Formatter(logging.Formatter):
    """An exception is named by type and place; its message, which might quote a value, is for "debug" only."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._with_traces = level <= logging.DEBUG

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        if self._with_traces:
            return super().formatException(ei)
        kind, _, trace = ei
        return f"{kind.__name__ if kind else 'error'} at {_place(trace)} (the trace: --log-level debug)"

    def exception_of(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class _PlainFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("fedsea.")
        line = folded(f"{clock} {record.levelname.lower():7} {name}: {record.getMessage()}", sys.stderr)
        trace = self.exception_of(record)
        return f"{line}\n{trace}" if trace else line


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := self.exception_of(record):
            entry["exception"] = trace
        return json.dumps(entry)


def _place(trace: TracebackType | None) -> str:
    if trace is None:
        return "an unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
