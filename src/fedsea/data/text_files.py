"""Files made of lines: JSON lines, CSV and plain text. A row's position is the byte offset where it begins."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar

from fedsea.data.rows import MAX_ROW_BYTES, Int64s, Row, RowError, Stamp, Values
from fedsea.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SEPARATORS = {";": "';'", "\t": "a tab", ",": "','"}
"""What spreadsheets put between columns, and its name in a message."""


class _Lines:
    """Decoded lines of a file from an offset on, counting bytes and lines; blank lines included.

    Attributes:
        at_top: Whether reading began at the top of the file.
        position: Offset behind the last line.
        line: Number of the last line; 1-based if reading began at the top.
    """

    def __init__(self, file: BinaryIO, position: int = 0) -> None:
        self._file = file
        self.at_top = position == 0
        self.position = file.seek(position)
        self.line = 0
        if position == 0 and file.read(len(_BOM)) == _BOM:
            self.position = len(_BOM)
        file.seek(self.position)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        self.position += len(raw)
        self.line += 1
        if len(raw) > MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = self._file.readline(MAX_ROW_BYTES)
                self.position += len(raw)
            raise RowError(f"is longer than {MAX_ROW_BYTES >> 20} MiB; split it")
        if b"\0" in raw:
            raise RowError("holds a NUL byte; save the file as UTF-8 text")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise RowError("is not valid UTF-8; save the file as UTF-8 text") from None

    def pass_record(self, position: int, line: int, delimiter: str) -> bool:
        """Go behind the CSV record that begins at an offset, after so many lines, whatever is in it.

        Returns:
            Whether it ends; if not, the rest of the file is inside a quote.
        """
        self.position, self.line = self._file.seek(position), line
        quotes = _Quotes(delimiter)
        while raw := self._file.readline(MAX_ROW_BYTES):
            self.position += len(raw)
            quotes.take(raw)
            if raw.endswith(b"\n"):
                self.line += 1
                if not quotes.open:
                    return True
        return not quotes.open


class _Quotes:
    """Whether a place in a CSV record is inside quotes, as `csv.reader` sees it; of any bytes, piece by piece."""

    _AFTER_QUOTE: ClassVar = {"begin": "quoted", "plain": "plain", "quoted": "closed", "closed": "quoted"}

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter.encode()
        self._state = "begin"  # of a field

    @property
    def open(self) -> bool:
        """Whether a line break here would belong to a field."""
        return self._state == "quoted"

    def take(self, piece: bytes) -> None:
        """The next bytes of the record."""
        for number, part in enumerate(piece.split(b'"')):
            if number:
                self._state = self._AFTER_QUOTE[self._state]
            if part and not self.open:
                self._state = "begin" if part.endswith(self._delimiter) else "plain"


class _LineFile:
    """What the three have in common: no handle between calls, and a look at the stamp before every reading."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = Stamp.of(path)

    def scan(self, columns: Sequence[str] | None) -> Iterator[Row]:  # noqa: ARG002 (a line is read whole)
        """All rows in order."""
        try:
            with self.path.open("rb") as file:
                yield from self._rows(_Lines(file))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from None
        self._stamp.check(self.path)

    def read(self, positions: Int64s, columns: Sequence[str]) -> Iterator[Values]:  # noqa: ARG002
        """Rows at byte offsets."""
        self._stamp.check(self.path)
        try:
            with self.path.open("rb") as file:
                for position in positions.tolist():
                    row = next(self._rows(_Lines(file, position)), None)
                    if row is None or row.values is None:
                        raise DataError(f"{self.path} has changed while it was in use; start again.")
                    yield row.values
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from None

    def blocks(self, positions: Int64s) -> None:
        """Any row is cheap to reach."""

    def _rows(self, lines: _Lines) -> Iterator[Row]:
        raise NotImplementedError


class JsonLines(_LineFile):
    """One JSON object a line."""

    def _rows(self, lines: _Lines) -> Iterator[Row]:
        while True:
            start = lines.position
            try:
                text = next(lines)
                if text.isspace():
                    continue
                values, problem = _json_object(text), ""
            except StopIteration:
                return
            except RowError as error:
                values, problem = None, str(error)
            yield Row(lines.line, start, lines.position - start, values, problem)


def _json_object(text: str) -> Values:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if (inner := text.strip()).startswith("{") and not inner.endswith("}"):
            raise RowError("ends within its JSON object; each line must hold one whole object") from None
        # Not `error.msg`: it may quote a character of the text.
        raise RowError(f"is not valid JSON (column {error.colno}); each line must be one JSON object") from None
    except (ValueError, RecursionError):
        raise RowError("holds a number or a nesting that is too large for JSON here") from None
    if not isinstance(values, dict):
        raise RowError(
            "is not a JSON object; each line must be one, so turn a list into lines "
            "(`jq -c '.[]' list.json > rows.jsonl`)"
        )
    return values


class PlainText(_LineFile):
    """Documents separated by blank lines; each is a row with the column `text`."""

    def _rows(self, lines: _Lines) -> Iterator[Row]:
        parts: list[str] = []
        start = size = line = 0
        problem = ""
        for before, text, fault in _with_faults(lines):
            if fault or text.strip():
                if not size:
                    start, line = before, lines.line
                size += lines.position - before
                if size > MAX_ROW_BYTES and not fault:
                    fault = (
                        f"is in a document of more than {MAX_ROW_BYTES >> 20} MiB; separate documents by blank lines"
                    )
                if fault and not problem:
                    problem, line = fault, lines.line
                    parts.clear()
                if not problem:
                    parts.append(text)
            elif size:
                values = None if problem else {"text": "".join(parts).rstrip("\r\n")}
                yield Row(line, start, size, values, problem)
                parts, size, problem = [], 0, ""


def _with_faults(lines: _Lines) -> Iterator[tuple[int, str, str]]:
    """Offset, text and fault of each line; a blank line closes the file."""
    while True:
        before = lines.position
        try:
            yield before, next(lines), ""
        except StopIteration:
            yield before, "", ""
            return
        except RowError as error:
            yield before, "", str(error)


class _ColumnsError(RowError):
    """A record that was read whole has too many or too few columns."""


def _csv_problem(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"has a field of more than {MAX_ROW_BYTES >> 20} MiB; split it"
    return "is not valid CSV; check its quotes and line ends"


class DelimitedText(_LineFile):
    """CSV or TSV with a header line; quoted fields may hold line breaks."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._header: list[str] = []

    def _rows(self, lines: _Lines) -> Iterator[Row]:
        # The module's own limit of 128 KiB a field is meant for spreadsheets, and can only be set for the process.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        records = csv.reader(lines, delimiter=self._delimiter, strict=True)
        if lines.at_top:
            self._header = self._read_header(records, lines)
        while True:
            start, line = lines.position, lines.line + 1
            values: Values | None = None
            problem = ""
            try:
                record = next(records)
                if not record:
                    continue
                values = self._named(record)
            except StopIteration:
                return
            except _ColumnsError as error:
                problem = str(error)
            except (RowError, csv.Error) as error:
                problem = str(error) if isinstance(error, RowError) else _csv_problem(error)
                # The reader gave up within the record, whose remaining lines are no rows.
                if not lines.pass_record(start, line - 1, self._delimiter):
                    raise DataError(f"{self.path}, line {line}: a quote is opened that is never closed.") from None
            yield Row(line, start, lines.position - start, values, problem)

    def _read_header(self, records: Iterator[list[str]], lines: _Lines) -> list[str]:
        try:
            header = [name.strip() for name in next(filter(None, records), [])]
        except (csv.Error, RowError):
            raise DataError(
                f"{self.path}, line {lines.line}: the header is not valid CSV in UTF-8; mend or replace it."
            ) from None
        where = f"{self.path}, line {lines.line}"
        if not header:
            raise DataError(f"{self.path} is empty; its first line must name the columns.")
        others = [mark for mark in _SEPARATORS if mark in header[0] and mark != self._delimiter]
        if len(header) == 1 and others:
            raise DataError(
                f"{where}: one column found; is the separator {_SEPARATORS[others[0]]}? Save the file with commas as "
                ".csv, or with tabs as .tsv."
            )
        if "" in header or len(set(header)) < len(header):
            raise DataError(f"{where}: the header has empty or repeated column names; name each once.")
        return header

    def _named(self, record: list[str]) -> Values:
        if len(record) != len(self._header):
            raise _ColumnsError(f"has {len(record)} columns, the header has {len(self._header)}")
        return dict(zip(self._header, record, strict=True))
