"""From segments of text to sequences of token ids with their targets."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedsea.data.formats import RowReader
from fedsea.data.rows import RowError, Values
from fedsea.data.templates import Rendered, render
from fedsea.data.tokenizer import beginning_of, ids_of
from fedsea.errors import ConfigError
from fedsea.types import IGNORE

Int32s = npt.NDArray[np.int32]


class RowFate(enum.IntEnum):
    """What became of a row."""

    UNREAD = 0
    WHOLE = 1
    CUT = 2
    """Plain text, cut into pieces."""
    TRUNCATED = 3
    """Its end does not fit into `max_tokens`."""
    EMPTY = 4
    """Dropped: it has no token that takes loss."""
    COMPLETION_LOST = 5
    """Dropped: every token that takes loss lies behind `max_tokens`."""
    BAD = 6
    """Dropped: its chat template refuses it."""


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """One sequence: token ids, and the id that follows each or `IGNORE`; both int32, of the same length.

    Attributes:
        document: Hash of the whole row's ids: the same for all pieces of a long text, and wherever it comes again.
        piece: Which piece of the row it is.
    """

    ids: Int32s
    targets: Int32s
    document: str = ""
    piece: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's sequences, in order; none if it is dropped.

    Attributes:
        problem: What is wrong with a row whose fate is `BAD`.
        masked_turns: See `Rendered`.
    """

    sequences: tuple[EncodedSequence, ...]
    fate: RowFate
    problem: str = ""
    masked_turns: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return 256 + sum(256 + sequence.ids.nbytes + sequence.targets.nbytes for sequence in self.sequences)


class Rewriter(Protocol):
    """What changes the texts of rows before they are put into templates, such as pseudonyms.

    Attributes:
        identity: Changes whenever a text would be rewritten otherwise.
    """

    identity: str

    def rows(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """The texts of rows, each row rewritten by itself: the same one always in the same way."""
        ...


class RowEncoder:
    """Encodes rows of one format.

    Args:
        tokenizer: A transformers tokenizer.
        reader: The silo's format.
        max_tokens: Longest sequence.
        loss_on: As in the plan's data section.
        rewrite: Changes texts first; None leaves them as they are.

    Raises:
        ConfigError: The beginning that the tokenizer prescribes leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: Any,
        reader: RowReader,
        *,
        max_tokens: int,
        loss_on: Literal["completion", "all"],
        rewrite: Rewriter | None = None,
    ) -> None:
        self._rewrite = rewrite
        self._tokenizer = tokenizer
        self._reader = reader
        self._max_tokens = max_tokens
        self._everywhere = loss_on == "all"
        self._beginning = beginning_of(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        if max_tokens <= len(self._beginning):
            raise ConfigError(f"data.max_tokens = {max_tokens} leaves no room for text; make it larger.")

    def encode(self, rows: Sequence[Values]) -> list[EncodedRow]:
        """Tokenise rows, all their segments in one call of the tokenizer."""
        if self._rewrite is not None:
            rows = self._reader.rewritten(rows, self._rewrite.rows)
        rendered = [self._render(row) for row in rows]
        texts = [segment.text for item in rendered if isinstance(item, Rendered) for segment in item.segments]
        ids = iter(ids_of(self._tokenizer, texts))
        encoded = []
        for item in rendered:
            if isinstance(item, RowError):
                encoded.append(EncodedRow((), RowFate.BAD, str(item)))
            else:
                encoded.append(self._row(item, [next(ids) for _ in item.segments]))
        return encoded

    def _render(self, row: Values) -> Rendered | RowError:
        try:
            return render(row, self._reader, self._tokenizer)
        except RowError as error:
            return error

    def _row(self, item: Rendered, ids_of_segments: list[list[int]]) -> EncodedRow:
        tokens, wanted = self._joined(item, ids_of_segments)
        learns = np.flatnonzero(wanted[1:])
        if not learns.size:
            return EncodedRow((), RowFate.EMPTY, masked_turns=item.masked_turns)
        limit, document = self._max_tokens, hashlib.blake2b(tokens.tobytes(), digest_size=12).hexdigest()
        if item.cut and len(tokens) > limit:
            # Pieces overlap by one token, so that the first token of a piece is predicted too: in the piece before.
            starts = range(0, len(tokens) - 1, limit - 1)
            pieces = (
                _sequence(tokens[at : at + limit], wanted[at : at + limit], document, piece)
                for piece, at in enumerate(starts)
            )
            return EncodedRow(tuple(pieces), RowFate.CUT)
        if int(learns[0]) + 1 >= limit:
            return EncodedRow((), RowFate.COMPLETION_LOST, masked_turns=item.masked_turns)
        fate = RowFate.WHOLE if len(tokens) <= limit else RowFate.TRUNCATED
        return EncodedRow(
            (_sequence(tokens[:limit], wanted[:limit], document, 0),), fate, masked_turns=item.masked_turns
        )

    def _joined(self, item: Rendered, ids_of_segments: list[list[int]]) -> tuple[Int32s, npt.NDArray[np.bool_]]:
        """A row's ids, and which of them are to be predicted."""
        tokens: list[int] = []
        wanted: list[bool] = []
        for segment, ids in zip(item.segments, ids_of_segments, strict=True):
            if not tokens and item.begins and ids[: len(self._beginning)] != self._beginning:
                tokens += self._beginning
                wanted += [False] * len(tokens)
            ending = [self._eos] if segment.ends and self._eos is not None and ids[-1:] != [self._eos] else []
            tokens += ids + ending
            wanted += [segment.target or self._everywhere] * (len(ids) + len(ending))
        return np.array(tokens, dtype=np.int32), np.array(wanted, dtype=np.bool_)


def _sequence(tokens: Int32s, wanted: npt.NDArray[np.bool_], document: str, piece: int) -> EncodedSequence:
    targets = np.full(len(tokens), IGNORE, dtype=np.int32)
    targets[:-1] = np.where(wanted[1:], tokens[1:], IGNORE)
    # A copy: a slice would keep the ids of the whole document alive in the cache.
    return EncodedSequence(tokens.copy(), targets, document, piece)
