"""Parquet files; a row's position is its number in the file, and reading one decodes its row group."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsea.data.rows import MAX_ROW_BYTES, Int64s, Row, Stamp, Values
from fedsea.errors import DataError

_KEEP_BYTES = 64 << 20
"""Decoded row groups that are kept; a file within this is shuffled freely, a larger one a row group at a time."""


class ParquetRows:
    """Rows of a parquet file.

    A row group is the smallest unit that can be decoded, so it must fit in memory; write row groups of
    some thousand rows.
    """

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = Stamp.of(path)
        self._starts: Int64s = np.zeros(0, np.int64)
        self._sizes: Int64s = np.zeros(0, np.int64)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def scan(self, columns: Sequence[str] | None) -> Iterator[Row]:
        """All rows in order, decoded a thousand at a time; for `None` one without values: all have its columns."""
        with self._open() as file:
            names = self._names(file)
            if columns is None:
                if file.metadata.num_rows:
                    yield Row(1, 0, 0, dict.fromkeys(names))
                return
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            self._starts = np.cumsum([0, *(group.num_rows for group in groups)], dtype=np.int64)
            self._sizes = np.array([_text_bytes(group, columns) for group in groups], dtype=np.int64)
            wanted = [name for name in columns if name in names]
            number = 0
            for batch in self._batches(file, wanted):
                for values, problem in _python_rows(batch):
                    size = _size(values)
                    if size > MAX_ROW_BYTES:
                        values, problem = None, f"is longer than {MAX_ROW_BYTES >> 20} MiB; split it"
                    yield Row(number + 1, number, size, values, problem)
                    number += 1
        self._stamp.check(self.path)

    def read(self, positions: Int64s, columns: Sequence[str]) -> Iterator[Values]:
        """Rows by number."""
        self._stamp.check(self.path)
        for position in positions.tolist():
            group = int(np.searchsorted(self._starts, position, side="right")) - 1
            table = self._group(group, columns)
            offset = position - int(self._starts[group])
            row: Values = table.slice(offset, 1).to_pylist()[0]
            yield row

    def blocks(self, positions: Int64s) -> Int64s | None:
        """Row group of each row, unless the whole file can be kept decoded."""
        if int(self._sizes.sum()) <= _KEEP_BYTES:
            return None
        return np.searchsorted(self._starts, positions, side="right").astype(np.int64) - 1

    def _group(self, group: int, columns: Sequence[str]) -> Any:
        if group not in self._kept:
            with self._open() as file:
                wanted = [name for name in columns if name in file.schema_arrow.names]
                table = self._guarded(lambda: file.read_row_group(group, columns=wanted, use_threads=False))
            self._kept[group] = table
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEEP_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        return self._guarded(lambda: pq.ParquetFile(self.path))

    def _names(self, file: Any) -> list[str]:
        names: list[str] = self._guarded(lambda: file.schema_arrow.names)
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DataError(f"{self.path} has several columns named {', '.join(twice)}; name each once.")
        return names

    def _batches(self, file: Any, columns: list[str]) -> Iterator[Any]:
        batches = iter(file.iter_batches(batch_size=1024, columns=columns, use_threads=False))
        while (batch := self._guarded(lambda: next(batches, None))) is not None:
            yield batch

    def _guarded(self, call: Any) -> Any:
        import pyarrow as pa

        try:
            return call()
        except (pa.ArrowException, OSError):
            raise DataError(f"{self.path} is not a readable parquet file, or it is damaged; write it again.") from None


def _text_bytes(group: Any, columns: Sequence[str]) -> int:
    parts = (group.column(i) for i in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)


def _python_rows(batch: Any) -> Iterator[tuple[Values | None, str]]:
    import pyarrow as pa

    # What Python has no value for: a date behind the year 9999 (overflow), a time zone without a name here (lookup).
    no_value = (ValueError, OverflowError, LookupError, pa.ArrowException)
    try:
        yield from ((values, "") for values in batch.to_pylist())
    except no_value:
        # The list is made before its first row is handed out, so no row has been seen yet.
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0], ""
            except UnicodeDecodeError:
                yield None, "is not valid UTF-8"
            except no_value:
                yield None, "holds a value that is no text"


def _size(value: object) -> int:
    """Bytes of text in a value, about: characters of its strings."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return 0
