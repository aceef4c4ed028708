"""An opened silo: an index of row positions, rows read and tokenised on demand, and what became of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fedsea.data.encoding import EncodedRow, EncodedSequence, RowEncoder, RowFate
from fedsea.data.formats import DataFormat, RowReader
from fedsea.data.rows import Int64s, RowFile, Values
from fedsea.errors import DataError

CACHE_BYTES = 64 << 20
"""Tokenised rows that are kept, least recently used first to go: a small silo is tokenised once, not every epoch."""

CHUNK_ROWS = 256
CHUNK_BYTES = 4 << 20
"""Rows that are read and tokenised together: at most so many, and about so much text."""


def bad_row(place: str, problem: str) -> DataError:
    """The error for a malformed row, where such rows are not skipped."""
    return DataError(f"{place}: the row {problem}. Mend it, or leave such rows out with --skip-bad-rows.")


@dataclass(frozen=True)
class RowIndex:
    """Where the good rows of all files are.

    Attributes:
        files: In the order given.
        file_of: Row to file.
        positions: Row to position in its file.
        lines: Row to 1-based line in its file.
        sizes: Row to bytes of text, about.
        blocks: Row to block, where rows of a block must be read together for speed; `None` if nowhere.
    """

    files: tuple[RowFile, ...]
    file_of: Int64s
    positions: Int64s
    lines: Int64s
    sizes: Int64s
    blocks: Int64s | None

    def __len__(self) -> int:
        return len(self.positions)

    def sha256(self) -> str:
        """Of which rows of the files are good ones, and so of what every row's number means."""
        return hashlib.sha256(self.file_of.tobytes() + self.positions.tobytes()).hexdigest()

    def read(self, rows: Int64s, columns: Sequence[str]) -> list[Values]:
        """Rows from their files, in the order asked; each file is opened once."""
        found: dict[int, Values] = {}
        for number in np.unique(self.file_of[rows]).tolist():
            here = np.sort(rows[self.file_of[rows] == number])
            values = self.files[number].read(self.positions[here], columns)
            found.update(zip(here.tolist(), values, strict=True))
        return [found[row] for row in rows.tolist()]

    def chunk(self, rows: Int64s, start: int) -> Int64s:
        """The rows from `start` on that are read together; a pure function of the index."""
        rows = rows[start : start + CHUNK_ROWS]
        within = np.cumsum(self.sizes[rows]) <= CHUNK_BYTES
        return rows[: max(1, int(within.sum()))]

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        file = self.files[int(self.file_of[row])]
        return f"{file.path}, {file.unit} {int(self.lines[row])}"


@dataclass(frozen=True)
class SiloSummary:
    """What is in a silo. Counts from `num_read` on are of the rows tokenised so far, each counted once.

    Attributes:
        num_bad: Malformed rows that were skipped.
        num_read: Rows tokenised so far; a small silo is read whole when it is opened.
        num_cut: Plain texts cut into pieces.
        num_truncated: Rows whose end was cut off.
        num_empty: Rows dropped because nothing in them takes loss.
        num_completion_lost: Rows dropped because their completion lies wholly behind `max_tokens`.
        num_masked_turns: Assistant turns without loss, see `Rendered`.
    """

    files: tuple[str, ...]
    format: str
    num_rows: int
    num_train: int
    num_heldout: int
    num_bad: int
    num_read: int
    num_sequences: int
    num_tokens: int
    num_target_tokens: int
    num_cut: int
    num_truncated: int
    num_empty: int
    num_completion_lost: int
    num_masked_turns: int

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """A sentence for each thing that the silo's owner should know."""
        read = f"of {self.num_read} rows read"
        sentences = {
            "malformed rows were skipped": self.num_bad,
            f"{read} were cut off at data.max_tokens": self.num_truncated,
            f"{read} were dropped: they have nothing to learn (an empty text or completion, a chat without a turn of "
            "the assistant)": self.num_empty,
            f"{read} were dropped: their prompt alone fills data.max_tokens": self.num_completion_lost,
            "assistant turns take no loss: the chat template renders them unlike the last turn": self.num_masked_turns,
        }
        return [f"{count} {sentence}." for sentence, count in sentences.items() if count]


class Sequences:
    """Some rows of a silo as sequences, in row order, tokenised while iterating."""

    def __init__(self, silo: Silo, rows: Int64s) -> None:
        self._silo = silo
        self.rows = rows

    @property
    def num_rows(self) -> int:
        """Rows; a row gives one sequence, several (long plain text) or none (nothing to learn)."""
        return len(self.rows)

    def __iter__(self) -> Iterator[EncodedSequence]:
        start = 0
        while start < len(self.rows):
            chunk = self._silo.index.chunk(self.rows, start)
            yield from self._silo.sequences(chunk)
            start += len(chunk)


class Silo:
    """The rows of a client's files; made by `open_silo`. Used by one thread at a time.

    Attributes:
        index: Where the rows are.
    """

    def __init__(
        self, index: RowIndex, reader: RowReader, encoder: RowEncoder, *, train: Int64s, heldout: Int64s,
        num_bad: int, skip_bad: bool, settings: dict[str, object],
    ) -> None:  # fmt: skip
        self.index = index
        self._reader = reader
        self._encoder = encoder
        self._train = train
        self._heldout = heldout
        self._num_bad = num_bad
        self._skip_bad = skip_bad
        self._settings = settings
        self._cache: OrderedDict[int, EncodedRow] = OrderedDict()
        self._cache_bytes = 0
        self._fates = np.zeros(len(index), np.uint8)
        self._totals: Counter[str] = Counter()
        self._fingerprint: int | None = None

    @property
    def num_rows(self) -> int:
        """Good rows in all files."""
        return len(self.index)

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return len(self._train)

    @property
    def num_heldout(self) -> int:
        """Rows kept for validation."""
        return len(self._heldout)

    @property
    def format(self) -> DataFormat:
        """The format as decided, every column named."""
        return self._reader.format()

    def train(self) -> Sequences:
        """The training split in row order."""
        return Sequences(self, self._train)

    def heldout(self) -> Sequences:
        """The held-out split in row order."""
        return Sequences(self, self._heldout)

    def fingerprint(self) -> int:
        """48 bits over the rows' sizes and settings: differs where a saved position would mean something else."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self.num_rows, self._settings], sort_keys=True).encode())
            digest.update(self.index.sizes.tobytes())
            self._fingerprint = int.from_bytes(digest.digest()[:6], "big")
        return self._fingerprint

    def sequences(self, rows: Int64s) -> list[EncodedSequence]:
        """The sequences of rows, row after row.

        Raises:
            DataError: A file has changed, or a row's chat template refuses it (unless bad rows are skipped).
        """
        encoded: dict[int, EncodedRow] = {}
        for row in rows.tolist():
            if row in self._cache:
                self._cache.move_to_end(row)
                encoded[row] = self._cache[row]
        missing = np.array([row for row in rows.tolist() if row not in encoded], dtype=np.int64)
        if missing.size:
            values = self.index.read(missing, self._reader.columns)
            for row, item in zip(missing.tolist(), self._encoder.encode(values), strict=True):
                self._note(row, item)
                encoded[row] = item
        return [sequence for row in rows.tolist() for sequence in encoded[row].sequences]

    def summary(self) -> SiloSummary:
        """What is in the silo, as far as it has been read."""
        fates = np.bincount(self._fates, minlength=len(RowFate))
        return SiloSummary(
            files=tuple(str(file.path) for file in self.index.files),
            format=self._reader.name,
            num_rows=self.num_rows,
            num_train=self.num_train,
            num_heldout=self.num_heldout,
            num_bad=self._num_bad + int(fates[RowFate.BAD]),
            num_read=self.num_rows - int(fates[RowFate.UNREAD]),
            num_sequences=self._totals["sequences"],
            num_tokens=self._totals["tokens"],
            num_target_tokens=self._totals["target_tokens"],
            num_cut=int(fates[RowFate.CUT]),
            num_truncated=int(fates[RowFate.TRUNCATED]),
            num_empty=int(fates[RowFate.EMPTY]),
            num_completion_lost=int(fates[RowFate.COMPLETION_LOST]),
            num_masked_turns=self._totals["masked_turns"],
        )

    def _note(self, row: int, item: EncodedRow) -> None:
        if item.fate is RowFate.BAD and not self._skip_bad:
            raise bad_row(self.index.place(row), item.problem)
        if self._fates[row] == RowFate.UNREAD:
            self._fates[row] = item.fate
            self._totals["sequences"] += len(item.sequences)
            self._totals["tokens"] += sum(len(sequence) for sequence in item.sequences)
            self._totals["target_tokens"] += sum(int((s.targets >= 0).sum()) for s in item.sequences)
            self._totals["masked_turns"] += item.masked_turns
        self._cache[row] = item
        self._cache_bytes += item.num_bytes
        while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cache_bytes -= self._cache.popitem(last=False)[1].num_bytes
