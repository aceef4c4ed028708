"""Packed micro-batches: an endless resumable stream for training, one pass for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch

from fedsea.data.encoding import EncodedSequence
from fedsea.data.rows import Int64s
from fedsea.data.shuffling import shuffled
from fedsea.data.silo import Silo
from fedsea.errors import ConfigError, DataError
from fedsea.types import TokenBatch

_VERSION = 1


def pack(sequences: Sequence[EncodedSequence]) -> TokenBatch:
    """Put sequences end to end, without padding."""
    known = all(sequence.document for sequence in sequences)
    return TokenBatch(
        input_ids_T=torch.from_numpy(np.concatenate([sequence.ids for sequence in sequences]).astype(np.int64)),
        targets_T=torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences]).astype(np.int64)),
        lengths=tuple(len(sequence) for sequence in sequences),
        documents=tuple(sequence.document for sequence in sequences) if known else (),
        pieces=tuple(sequence.piece for sequence in sequences) if known else (),
    )


class BatchStream:
    """Endless batches of a silo's training split, each epoch in another order.

    The rows of an epoch are shuffled; they are tokenised in windows (some hundred rows), and the sequences of a window
    are shuffled once more, so that the pieces of a long document part. Epochs follow each other without a gap: every
    batch has the same number of sequences. Everything is a function of seed and position, so `state` is a few
    integers and restoring costs the tokenising of one window.

    Args:
        silo: Its training split is used.
        seed: Decides the order; clients should have different ones.
        sequences_per_batch: Sequences of a batch.
    """

    def __init__(self, silo: Silo, *, seed: int, sequences_per_batch: int) -> None:
        if sequences_per_batch < 1:
            raise ConfigError("sequences_per_batch must be 1 or more.")
        self._silo = silo
        self._seed = seed
        self._sequences_per_batch = sequences_per_batch
        self._epoch = 0
        self._row = 0
        self._sequence = 0
        self._order: Int64s | None = None
        self._window: list[EncodedSequence] | None = None
        self._window_rows = 0

    def next(self) -> TokenBatch:
        """The next batch.

        Raises:
            DataError: A file has changed, or a row turns out to be bad.
        """
        taken: list[EncodedSequence] = []
        while len(taken) < self._sequences_per_batch:
            window = self._load_window()
            part = window[self._sequence : self._sequence + self._sequences_per_batch - len(taken)]
            taken += part
            self._sequence += len(part)
            if self._sequence >= len(window):
                self._next_window()
        return pack(taken)

    def state(self) -> dict[str, int]:
        """Where the stream stands, as JSON."""
        return {
            "version": _VERSION,
            "data": self._silo.fingerprint(),
            "seed": self._seed,
            "epoch": self._epoch,
            "row": self._row,
            "sequence": self._sequence,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on exactly where `state` was taken; the size of batches may be another one.

        Raises:
            DataError: The state is of other data, another seed or settings, or damaged.
        """
        here = self.state()
        if set(state) != set(here) or state["version"] != _VERSION:
            raise DataError("The saved data position is damaged or of another version of fedsea; start a new run.")
        if state["data"] != here["data"] or state["seed"] != here["seed"]:
            raise DataError(
                "The saved data position belongs to other data files, another seed or other data settings: "
                "put the files and settings of the interrupted run back, or start a new run (a new --run folder at the "
                "server and at every client)."
            )
        if min(state["epoch"], state["row"], state["sequence"]) < 0 or state["row"] >= self._silo.num_train:
            raise DataError("The saved data position is damaged; go back to an older checkpoint.")
        self._epoch, self._row, self._sequence = state["epoch"], state["row"], state["sequence"]
        self._order = self._window = None

    def _load_window(self) -> list[EncodedSequence]:
        if self._order is None:
            rows, blocks = self._silo.train().rows, self._silo.index.blocks
            own = None if blocks is None else blocks[rows]
            self._order = shuffled(rows, self._seed, self._epoch, blocks=own)
        if self._window is None:
            rows = self._silo.index.chunk(self._order, self._row)
            sequences = self._silo.sequences(rows)
            order = shuffled(np.arange(len(sequences), dtype=np.int64), self._seed, self._epoch, self._row)
            self._window = [sequences[i] for i in order.tolist()]
            self._window_rows = len(rows)
        return self._window

    def _next_window(self) -> None:
        self._row += self._window_rows
        self._sequence = 0
        self._window = None
        if self._row >= self._silo.num_train:
            self._epoch += 1
            self._row = 0
            self._order = None


def evaluation_batches(silo: Silo, *, sequences_per_batch: int, max_sequences: int | None) -> Iterator[TokenBatch]:
    """The held-out split once, in order; the last batch may be smaller.

    Nothing comes out if nothing is held out, or if no held-out row has anything to learn.
    """
    if sequences_per_batch < 1:
        raise ConfigError("sequences_per_batch must be 1 or more.")
    sequences = islice(iter(silo.heldout()), max_sequences)
    while batch := list(islice(sequences, sequences_per_batch)):
        yield pack(batch)
