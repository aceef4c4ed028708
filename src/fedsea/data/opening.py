"""Opening a silo: find every row once, refuse bad ones, split, and read enough to know that it is of use."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsea.data.encoding import Rewriter, RowEncoder
from fedsea.data.formats import DataFormat, RowReader, resolve
from fedsea.data.parquet_files import ParquetRows
from fedsea.data.rows import Int64s, Row, RowError, RowFile, Stamp
from fedsea.data.shuffling import heldout_mask
from fedsea.data.silo import RowIndex, Silo, bad_row
from fedsea.data.text_files import DelimitedText, JsonLines, PlainText
from fedsea.data.tokenizer import beginning_of
from fedsea.errors import DataError
from fedsea.plan import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURVEY_BYTES = 4 << 20
"""Text that is tokenised at opening, so that the summary of an ordinary silo is complete before training begins."""

_OPENERS: dict[str, Callable[[Path], RowFile]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": lambda path: DelimitedText(path, ","),
    ".tsv": lambda path: DelimitedText(path, "\t"),
    ".parquet": ParquetRows,
    ".txt": PlainText,
}


def open_silo(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSection,
    *,
    format: DataFormat | None = None,
    seed: int,
    on_bad_row: Literal["error", "skip"] = "error",
    rewrite: Rewriter | None = None,
) -> Silo:
    """Open the files of one silo: every row is looked at once, none is kept.

    Args:
        files: One or more, see `fedsea.data` for their kinds; all in one format.
        tokenizer: The model's.
        settings: The plan's data section.
        format: `None` recognises it from the first row.
        seed: Decides the held-out split; the same for every opening of a run.
        on_bad_row: "skip" counts malformed rows instead of refusing them.
        rewrite: Changes every row's texts before they are tokenised; None leaves them as they are.

    Raises:
        DataError: A file cannot be read or a row is malformed (named by file and line), or no row is of use.
        ConfigError: The format's fields make no sense, or `max_tokens` leaves no room for text.
    """
    opened = _open_files([Path(file) for file in files])
    reader = _recognise(opened, format or DataFormat())
    index, num_bad = _index(opened, reader, skip=on_bad_row == "skip")
    encoder = RowEncoder(tokenizer, reader, max_tokens=settings.max_tokens, loss_on=settings.loss_on, rewrite=rewrite)
    heldout = heldout_mask(len(index), settings.holdout, seed)
    silo = Silo(
        index,
        reader,
        encoder,
        train=np.flatnonzero(~heldout),
        heldout=np.flatnonzero(heldout),
        num_bad=num_bad,
        skip_bad=on_bad_row == "skip",
        settings={
            "seed": seed,
            "columns": reader.columns,
            "plan": settings.model_dump(mode="json"),
            "tokenizer": [len(tokenizer), tokenizer.eos_token_id, beginning_of(tokenizer)],
            **({} if rewrite is None else {"rewrite": rewrite.identity}),
        },
    )
    _survey(silo, settings)
    return silo


def texts_of(files: Sequence[Path], format: DataFormat | None = None) -> Iterator[tuple[str, list[str]]]:
    """Where each good row is, and its texts, one after the other; for whoever looks at rows without a model.

    Raises:
        DataError: A file cannot be read.
        ConfigError: The format's fields make no sense.
    """
    opened = _open_files([Path(file) for file in files])
    reader = _recognise(opened, format or DataFormat())
    for file in opened:
        for row in file.scan(reader.columns):
            if row.values is not None:
                yield _place(file, row), reader.all_texts(row.values)


def check_names(paths: Sequence[Path]) -> None:
    """What the names of a silo's files alone can tell, before anything is read.

    Raises:
        DataError: There is none, one comes twice, or one is of no known kind.
    """
    if not paths:
        raise DataError("A silo needs at least one data file; name one.")
    seen: dict[object, Path] = {}
    for path in paths:
        identity = _identity(path)
        if identity in seen:
            before = seen[identity]
            names = "" if before == path else f", as {before} and as {path}"
            raise DataError(f"A data file is named twice{names}; its rows would count double, so name it once.")
        seen[identity] = path
    for path in paths:
        if path.suffix.lower() not in _OPENERS and not path.is_dir():
            raise DataError(
                f"{path}: the ending {path.suffix!r} says no known kind of file; use {', '.join(_OPENERS)} "
                "(a .json list becomes lines with `jq -c '.[]' rows.json > rows.jsonl`)."
            )


def check_beginning(files: Sequence[Path], format: DataFormat | None = None, *, skip_bad: bool = False) -> None:
    """What the first rows of a silo tell, before anything else is loaded.

    Args:
        files: As for `open_silo`.
        format: Likewise.
        skip_bad: Whether malformed rows are skipped.

    Raises:
        DataError: There is no row, the first one is malformed, or its columns are of no known format.
        ConfigError: The format's fields make no sense.
    """
    opened = _open_files([Path(file) for file in files])
    first = next(((file, row) for file in opened for row in file.scan(None)), None)
    if first is None:
        raise _no_row(opened)
    file, row = first
    if row.values is None and not skip_bad:
        raise bad_row(_place(file, row), row.problem)
    _recognise(opened, format or DataFormat())


def _place(file: RowFile, row: Row) -> str:
    """As `RowIndex.place`, of a row that is in no index yet."""
    return f"{file.path}, {file.unit} {row.line}"


def _no_row(files: Sequence[RowFile], skipped: str = "") -> DataError:
    return DataError(f"There is no row in {_names(files)}{skipped}; a silo needs text to train on.")


def _identity(path: Path) -> object:
    """The same for every name of a file: other spellings of its path, and links to it of both kinds."""
    try:
        stat = path.stat()
    except OSError:
        return path.absolute()  # whoever opens it says what is wrong with it
    return stat.st_dev, stat.st_ino


def files_sha256(files: Sequence[Path]) -> str:
    """What identifies a silo's files: their bytes, in the order given; not where they lie.

    Raises:
        DataError: A file cannot be read.
    """
    whole = hashlib.sha256()
    for path in files:
        Stamp.of(path)
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return whole.hexdigest()


def _open_files(paths: list[Path]) -> tuple[RowFile, ...]:
    check_names(paths)
    return tuple(_OPENERS.get(path.suffix.lower(), JsonLines)(path) for path in paths)


def _recognise(files: Sequence[RowFile], wanted: DataFormat) -> RowReader:
    for file in files:
        for row in file.scan(None):
            if row.values is None:
                continue
            try:
                return resolve(wanted, tuple(row.values))
            except RowError as error:
                raise DataError(f"{_place(file, row)}: the row {error}.") from None
    # No good row anywhere: with the wanted format's own names, the scan that follows says what is wrong.
    return RowReader("text", {"text": "text"})


def _index(files: tuple[RowFile, ...], reader: RowReader, *, skip: bool) -> tuple[RowIndex, int]:
    places = {name: array("q") for name in ("file_of", "positions", "lines", "sizes")}
    num_bad = 0
    for number, file in enumerate(files):
        for row in file.scan(reader.columns):
            problem = row.problem
            if row.values is not None:
                try:
                    reader.check(row.values)
                except RowError as error:
                    problem = str(error)
            if problem:
                if not skip:
                    raise bad_row(_place(file, row), problem)
                num_bad += 1
                continue
            for name, value in zip(places, (number, row.position, row.line, row.size), strict=True):
                places[name].append(value)
    found = {name: np.array(values, dtype=np.int64) for name, values in places.items()}
    if not found["positions"].size:
        bad = f" ({num_bad} malformed rows were skipped)" if num_bad else ""
        raise _no_row(files, bad)
    return RowIndex(files, blocks=_blocks(files, found), **found), num_bad


def _blocks(files: Sequence[RowFile], found: dict[str, Int64s]) -> Int64s | None:
    blocks = np.zeros(len(found["positions"]), np.int64)
    next_block = 1
    for number, file in enumerate(files):
        here = found["file_of"] == number
        if (own := file.blocks(found["positions"][here])) is not None and own.size:
            blocks[here] = own + next_block
            next_block += int(own.max()) + 1
    return blocks if next_block > 1 else None


def _survey(silo: Silo, settings: DataSection) -> None:
    """Tokenise the beginning of a silo, all of a small one, and go on until a row to train on is found."""
    usable = False
    for rows in (silo.train().rows, silo.heldout().rows):
        start = num_bytes = 0
        while start < len(rows) and (num_bytes < SURVEY_BYTES or not usable):
            chunk = silo.index.chunk(rows, start)
            usable = bool(silo.sequences(chunk)) or usable
            num_bytes += int(silo.index.sizes[chunk].sum())
            start += len(chunk)
        if not usable:
            out = f" and {silo.num_heldout} of {silo.num_rows} rows held out" if silo.num_heldout else ""
            raise DataError(
                f"No row of {_names(silo.index.files)} is left to train on "
                f"with data.max_tokens = {settings.max_tokens}{out}: " + " ".join(silo.summary().warnings())
            )


def _names(files: Sequence[RowFile]) -> str:
    return ", ".join(str(file.path) for file in files)
