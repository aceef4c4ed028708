"""Types that rooms hand to each other.

Shape letters, used as suffixes of tensor names everywhere:

    T  tokens of a packed micro-batch: all its sequences end to end, without padding
    H  hidden size
    V  vocabulary size

A packed micro-batch of sequences with `lengths = (n_1, …, n_b)` has T = n_1 + … + n_b rows.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from fedsea.errors import ConfigError, UnprotectedRelease

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Target value of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks `start … stop - 1` of the full model."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigError(f"Block range {self.start}:{self.stop} is empty or negative.")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def covers(self, other: BlockRange) -> bool:
        """Whether `other` lies wholly inside this range."""
        return self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True, slots=True)
class Partition:
    """Where the model is cut: `input_blocks` first and `output_blocks` last blocks stay at the client."""

    input_blocks: int
    output_blocks: int

    def __post_init__(self) -> None:
        if self.input_blocks < 0 or self.output_blocks < 0:
            raise ConfigError("A partition's input_blocks and output_blocks must be 0 or more.")

    def trunk(self, num_blocks: int) -> BlockRange:
        """The server's blocks in a model of `num_blocks`.

        Raises:
            ConfigError: No block would be left for the trunk.
        """
        if self.input_blocks + self.output_blocks >= num_blocks:
            raise ConfigError(
                f"input_blocks={self.input_blocks} and output_blocks={self.output_blocks} leave no trunk in a "
                f"model of {num_blocks} blocks: lower one of them so that their sum is below {num_blocks}."
            )
        return BlockRange(self.input_blocks, num_blocks - self.output_blocks)


class SegmentKind(enum.StrEnum):
    """The three parts of a split model."""

    INPUT = "input"
    TRUNK = "trunk"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One packed micro-batch of token ids; stays at the client.

    Attributes:
        input_ids_T: int64 token ids.
        targets_T: int64 next-token targets, already shifted; `IGNORE` where no loss is taken (prompts, last position).
        lengths: Tokens of each sequence, in order; their sum is T.
        documents: Hash of the document that each sequence is of, as `data` makes it; () if unknown.
        pieces: Which piece of its document each sequence is; () if unknown.
    """

    input_ids_T: torch.Tensor
    targets_T: torch.Tensor
    lengths: tuple[int, ...]
    documents: tuple[str, ...] = ()
    pieces: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def num_target_tokens(self) -> int:
        """Positions that carry loss; the weight of this micro-batch in a step."""
        return int((self.targets_T != IGNORE).sum())

    def origin(self, purpose: Purpose) -> Origin:
        """What the rows of a release of this micro-batch come from."""
        return Origin(purpose, self.lengths, self.documents, self.pieces)


class Purpose(enum.StrEnum):
    """What a release is made for."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class Origin:
    """What the rows of a release come from: clipping and accounting need it. It stays at the client.

    Attributes:
        lengths: Rows of each sequence, in order; 0 for one that gets none.
        documents: Identity (a hash, never text) of each sequence's document; () if nobody knows it.
        pieces: Which piece of its document each sequence is; () for whole documents.
        most_rows: The most rows that a sequence may have in the end, where they are released bit by bit (a session);
            0: each sequence is released whole.
        turns: Of a session: behind how many of these rows one token may be; each sequence that begins with them counts
            once, and each row that comes later.
    """

    purpose: Purpose
    lengths: tuple[int, ...]
    documents: tuple[str, ...] = ()
    pieces: tuple[int, ...] = ()
    most_rows: int = 0
    turns: int = 0


class Channel(enum.StrEnum):
    """What kind of value leaves the client."""

    HIDDEN = "hidden"
    GRADIENT = "gradient"
    UPDATE = "update"


class Release:
    """Tensors that may leave the client: made by the privacy boundary alone, taken once.

    A retry sends the encoded bytes of the first sending again; it never takes the tensors a second time,
    because fresh noise on the same data would be a second release.
    """

    __slots__ = ("_tensors", "channel")

    def __init__(self, tensors: Mapping[str, torch.Tensor], channel: Channel) -> None:
        maker = sys._getframe(1).f_globals.get("__name__", "")
        if maker != "fedsea.privacy.boundary":
            raise UnprotectedRelease(f"A release was made in {maker}; only the privacy boundary may make one.")
        self._tensors: Mapping[str, torch.Tensor] | None = dict(tensors)
        self.channel = channel

    def __init_subclass__(cls, **_: object) -> None:
        raise UnprotectedRelease(f"{cls.__name__} would be a release that the privacy boundary did not make.")

    def __copy__(self) -> NoReturn:
        raise UnprotectedRelease("A release was about to be copied; it is taken once, and its bytes are kept instead.")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        self.__copy__()

    def take(self) -> Mapping[str, torch.Tensor]:
        """Hand the tensors to the encoder.

        Returns:
            Name to tensor; a single hidden state or gradient has the name "".

        Raises:
            UnprotectedRelease: The release was taken before.
        """
        if self._tensors is None:
            raise UnprotectedRelease("A release was about to be sent twice; retries send the recorded bytes instead.")
        tensors, self._tensors = self._tensors, None
        return tensors


@dataclass(frozen=True, slots=True)
class Reply:
    """Tensors that the server sends back: trunk outputs, input gradients, aggregated adapters.

    Attributes:
        tensors: Name to tensor; a single tensor has the name "".
    """

    tensors: Mapping[str, torch.Tensor]
