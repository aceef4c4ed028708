"""Decoding with a split model: input blocks and output blocks here, the trunk's part of the cache at its owner.

T  new tokens of all sequences end to end, R  rows whose logits are wanted, V  vocabulary size
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from fedsea.client.segments import ClientSegments
from fedsea.client.trunk import Trunk, TrunkSession
from fedsea.errors import CapacityError, ConfigError, ProtocolError
from fedsea.model.cache import Extension
from fedsea.model.decoding import rearranged
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.types import Origin, Purpose


class SplitDecoder:
    """Opens sequences that decode with one client's segments and a trunk. Any number of threads may use it.

    The adapters are those of the moment in which it is made.

    Args:
        plan: The federation's plan.
        segments: This client's segments.
        trunk: Where hidden states go.
        boundary: Maker of releases.
        on_version: Told of the trunk's version (see `TrunkSession`) at the first answer of any sequences.
    """

    def __init__(
        self,
        plan: FederationPlan,
        segments: ClientSegments,
        trunk: Trunk,
        boundary: Boundary,
        on_version: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.plan = plan
        self.segments = segments
        self.trunk = trunk
        self.boundary = boundary
        self.on_version = on_version
        self.lock = threading.Lock()  # around what is computed here; never held while the trunk is waited for
        self.input_adapters = segments.input_blocks.freeze()
        self.output_adapters = segments.output_blocks.freeze()
        config = segments.output_blocks.model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        bounds = getattr(config, "max_position_embeddings", None), segments.output_blocks.most_tokens
        self.max_tokens = min([plan.inference.max_tokens, *(int(bound) for bound in bounds if bound)])

    def renewed(self) -> SplitDecoder:
        """The same with the adapters as they are now; what was opened before goes on with those it had."""
        again = copy.copy(self)
        with self.lock:
            again.input_adapters = self.segments.input_blocks.freeze()
            again.output_adapters = self.segments.output_blocks.freeze()
        return again

    def open(self, max_tokens: int, num_sequences: int = 1) -> Sequences:
        """Sequences of at most so many tokens each, prompt and answer together; returns at once.

        Raises:
            ConfigError: The plan or the model does not allow so many tokens, or the family cannot decode with a cache.
        """
        if not 1 <= max_tokens <= self.max_tokens:
            raise ConfigError(
                f"Prompt and answer together may have {self.max_tokens} tokens here, and {max_tokens} were asked for: "
                "shorten the prompt or the answer (the bound is the smaller one of the plan's inference.max_tokens and "
                "the model's context)."
            )
        if not 1 <= num_sequences <= self.plan.inference.max_sequences:
            raise ConfigError(
                f"{num_sequences} sequences were asked for; the plan's inference.max_sequences is "
                f"{self.plan.inference.max_sequences}."
            )
        return Sequences(self, max_tokens, num_sequences)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of an extension that travels as one message.

    Attributes:
        lengths: New tokens of each sequence in this piece.
        rows: Rows of the piece whose logits are wanted.
        output: What comes back from the trunk.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    output: Future[torch.Tensor]


class Sequences:
    """Some sequences with their caches, here and at the trunk's owner. Made by `SplitDecoder.open`.

    One thread uses it at a time, but any may close it. Any error while the trunk is asked ends it.

    Attributes:
        lengths: Tokens of each sequence so far.
        tokens: Their ids.
    """

    def __init__(self, decoder: SplitDecoder, max_tokens: int, num_sequences: int) -> None:
        self.max_tokens = max_tokens
        self.lengths = [0] * num_sequences
        self.tokens: list[list[int]] = [[] for _ in self.lengths]
        self._decoder = decoder
        self._sources: tuple[int, ...] = ()
        self._answered = self._closed = False
        self._begun = [False] * num_sequences  # their first text is out
        segments = decoder.segments
        with decoder.lock:
            self._inputs = [segments.input_blocks.open_cache(max_tokens) for _ in self.lengths]
            self._outputs = [segments.output_blocks.open_cache(max_tokens) for _ in self.lengths]
        try:
            self.session: TrunkSession = decoder.trunk.open_session(max_tokens, num_sequences)
        except BaseException:
            self._close_caches()
            raise

    def extend(self, tokens: Sequence[Sequence[int]], wanted: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [R, V] in float32 after new tokens.

        Args:
            tokens: New token ids of each sequence; an empty list leaves a sequence as it is.
            wanted: For how many of each sequence's last new tokens; None: for the last one of each that has any.

        Returns:
            Rows of the first sequence, then of the second, and so on.

        Raises:
            ConfigError: A token is not in the vocabulary, or there is no new one.
            CapacityError: A sequence would be longer than it was opened for.
            FedseaError: The trunk is lost; the sequences are closed.
        """
        self._check(tokens)
        try:
            pieces = list(self._send(tokens, [min(1, len(ids)) for ids in tokens] if wanted is None else wanted))
            self._begun = [begun or bool(ids) for begun, ids in zip(self._begun, tokens, strict=True)]
            return self._receive(pieces)
        except BaseException:  # whatever it was, the caches here and there may not hold the same tokens any more
            self.close()
            raise

    def _check(self, tokens: Sequence[Sequence[int]]) -> None:
        if len(tokens) != len(self.lengths) or not any(tokens):
            raise ConfigError("There is no new token: a prompt needs at least one.")
        size = self._decoder.vocab_size
        if any(not 0 <= token < size for ids in tokens for token in ids):
            raise ConfigError(f"A token id is not below {size}, the model's vocabulary: use the model's own tokenizer.")
        for length, ids in zip(self.lengths, tokens, strict=True):
            if length + len(ids) > self.max_tokens:
                raise CapacityError(
                    f"A sequence would have {length + len(ids)} tokens and was opened for {self.max_tokens}."
                )

    @torch.inference_mode()
    def _send(self, tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> Iterator[_Piece]:
        """Piece by piece through the input blocks and out; the trunk works on one while the next is computed."""
        decoder, sources = self._decoder, self._sources
        self._sources = ()
        segments = decoder.segments
        for spans in _cut([len(ids) for ids in tokens], decoder.plan.inference.prefill_tokens):
            lengths = tuple(stop - start for start, stop in spans)
            ids_T = torch.tensor([t for ids, (start, stop) in zip(tokens, spans, strict=True) for t in ids[start:stop]])
            positions = tuple(self.lengths)
            with decoder.lock:
                self._check_open()
                extension = Extension.of(lengths, self._inputs)
                hidden_TH = segments.input_blocks.extend(ids_T.to(segments.device), extension, decoder.input_adapters)
                extension.commit()
                sealed = decoder.trunk.seal(decoder.boundary.hidden(hidden_TH, self._origin(lengths)))
            output = self.session.extend(sealed, positions, lengths, sources)
            sources = ()
            for number, (start, stop) in enumerate(spans):
                self.lengths[number] += stop - start
                self.tokens[number] += tokens[number][start:stop]
            yield _Piece(lengths, _rows(spans, [len(ids) for ids in tokens], wanted), output)

    def _origin(self, lengths: tuple[int, ...]) -> Origin:
        """What new rows come from, and behind how many of them one token may be.

        In a sequence's first text every token has one row. What follows was drafted or chosen here: it may be a copy of
        any token before it (a drafter's), or depend on all of them (a penalty's, or a trained output segment's).
        """
        turns = 0
        for held, new, begun in zip(self.lengths, lengths, self._begun, strict=True):
            turns += new if begun else bool(new) and held == 0
        return Origin(Purpose.INFERENCE, lengths, most_rows=self.max_tokens, turns=turns)

    @torch.inference_mode()
    def _receive(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        decoder, segments = self._decoder, self._decoder.segments
        logits = []
        for piece in pieces:
            hidden_TH = piece.output.result().to(segments.device)
            if not self._answered:
                self._answered = True
                decoder.on_version(self.session.version)
            with decoder.lock:
                self._check_open()
                extension = Extension.of(piece.lengths, self._outputs)
                rows_R = torch.tensor(piece.rows, dtype=torch.long, device=segments.device)
                logits.append(segments.output_blocks.extend(hidden_TH, extension, decoder.output_adapters, rows_R))
                extension.commit()
        return torch.cat(logits).float() if len(logits) > 1 else logits[0].float()

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget each sequence's tokens from a position on; the trunk's owner is told with the next message.

        Raises:
            ConfigError: A sequence is shorter.
        """
        for held, length in zip(self.lengths, lengths, strict=True):
            if not 0 <= length <= held:
                raise ConfigError(f"A sequence of {held} tokens cannot go back to {length}.")
        for caches in (self._inputs, self._outputs):
            for cache, length in zip(caches, lengths, strict=True):
                cache.rollback(length)
        self.lengths = list(lengths)
        for ids, length in zip(self.tokens, lengths, strict=True):
            del ids[length:]

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each sequence go on from what another one (or itself) has so far, as beams do."""
        if list(sources) == list(range(len(self.lengths))):
            return
        with self._decoder.lock, torch.inference_mode():
            self._check_open()
            self._inputs = rearranged(self._inputs, sources)
            self._outputs = rearranged(self._outputs, sources)
        self.lengths = [self.lengths[source] for source in sources]
        self.tokens = [list(self.tokens[source]) for source in sources]
        self._begun = [self._begun[source] for source in sources]
        self._sources = tuple(self._sources[source] for source in sources) if self._sources else tuple(sources)

    def _check_open(self) -> None:
        """Under the decoder's lock: what is closed must not write into caches that others have by now."""
        if self._closed:
            raise ProtocolError("These sequences were closed; open new ones.")

    def close(self) -> None:
        """Give all memory back, here and there; may be called twice, and from any thread to end an answer early."""
        self.session.close()
        self._close_caches()

    def _close_caches(self) -> None:
        with self._decoder.lock:
            self._closed = True
            for cache in (*self._inputs, *self._outputs):
                cache.close()

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Spans of each sequence for messages of at most `most` tokens; small extensions of many sequences stay whole.

    >>> list(_cut([5, 2], 4))
    [[(0, 4), (0, 0)], [(4, 5), (0, 2)]]
    """
    most = max(most, len(lengths)) if max(lengths) == 1 else most
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        room, spans = most, []
        for number, length in enumerate(lengths):
            stop = min(length, done[number] + room)
            spans.append((done[number], stop))
            room -= stop - done[number]
            done[number] = stop
        yield spans


def _rows(spans: Sequence[tuple[int, int]], lengths: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Rows of a message whose logits are wanted."""
    rows: list[int] = []
    offset = 0
    for (start, stop), length, count in zip(spans, lengths, wanted, strict=True):
        rows += range(offset + max(start, length - count) - start, offset + stop - start)
        offset += stop - start
    return tuple(rows)
