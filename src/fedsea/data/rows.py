"""What every kind of file offers: its rows, found once and read again by position."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedsea.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""Longest row; bounds what one row costs to tokenise."""

Values = Mapping[str, object]
"""A row: column name to value."""

Int64s = npt.NDArray[np.int64]


class RowError(Exception):
    """A row that cannot be used; the message continues "file, line N: the row …" and never holds its text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as found in a scan.

    Attributes:
        line: 1-based line (row number in parquet) where it begins.
        position: Where `RowFile.read` finds it again: byte offset, or row number.
        size: Bytes of its text, about.
        values: Its columns; `None` if it is malformed.
        problem: What is wrong with a malformed row.
    """

    line: int
    position: int
    size: int
    values: Values | None
    problem: str = ""


class RowFile(Protocol):
    """A file of rows. Holds no open handle between calls."""

    path: Path
    unit: str
    """What `Row.line` counts: "line" or "row"."""

    def scan(self, columns: Sequence[str] | None) -> Iterator[Row]:
        """All rows in order, malformed ones included.

        Args:
            columns: Those that will be used; `None`: only which columns a row has will be looked at.
        """
        ...

    def read(self, positions: Int64s, columns: Sequence[str]) -> Iterator[Values]:
        """Rows at positions that a scan gave, in the order asked.

        Raises:
            DataError: The file has changed since it was opened.
        """
        ...

    def blocks(self, positions: Int64s) -> Int64s | None:
        """Block of each position, where reading one row costs reading its block; `None` if any row is cheap."""
        ...


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and time of change: what tells that a file is still the one that was indexed."""

    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The file as it is now.

        Raises:
            DataError: It is missing, a folder, a pipe or the like, or not readable.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise DataError(f"There is no data file {path}; check the name and the folder.") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        if S_ISDIR(stat.st_mode):
            raise DataError(f"{path} is a folder; name the data files in it.")
        if not S_ISREG(stat.st_mode):  # it may have no end, or nothing to read until somebody writes
            raise DataError(f"{path} is a pipe or a device; write its rows into a file, and name that.")
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read: give this user the permission to read it.")
        return cls(stat.st_size, stat.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Refuse a file that was written after it was opened: positions would point at other rows.

        Raises:
            DataError: The file has changed.
        """
        if Stamp.of(path) != self:
            raise DataError(f"{path} has changed while it was in use; start again, and leave it as it is during a run.")
