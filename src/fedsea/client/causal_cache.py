"""The cache that transformers' `generate` hands on from token to token: here, sequences of a split decoder.

B  rows of a padded batch, C  new columns, K  columns whose logits are wanted, V  vocabulary size
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from transformers import Cache

from fedsea.client.decoding import Sequences, SplitDecoder
from fedsea.client.padding import mask_of
from fedsea.errors import ConfigError


class SplitCache(Cache):  # type: ignore[misc]
    """What a split model remembers of a batch: columns of transformers' making, tokens of its own.

    Opened at the first forward pass; `close` it, or use it as a context manager, to give the memory back here and at
    the server. `generate` closes those that it makes itself.

    Args:
        decoder: Opens the sequences.
        max_tokens: Most columns of a row, padding, prompt and answer together.
        keeper: Closes it in the end, if nobody else does.
    """

    def __init__(self, decoder: SplitDecoder, max_tokens: int, keeper: CacheKeeper | None = None) -> None:
        super().__init__(layers=[])
        self.max_tokens = max_tokens
        self._decoder = decoder
        self._keeper = keeper
        self._sequences: Sequences | None = None
        self._mask_BS = torch.empty(0, 0, dtype=torch.bool)
        self._closed = False

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> SplitCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the model ----------------------------------------------------------------------------------------------

    def extend(self, input_ids_BC: torch.Tensor, attention_mask: torch.Tensor | None, keep: int) -> torch.Tensor:
        """Logits [B, K, V] in float32 of the last columns, after new ones; zeros where there is padding.

        Args:
            input_ids_BC: Ids of the new columns.
            attention_mask: Of all columns so far, or of the new ones alone; None: no padding among them.
            keep: K; 0 for all new columns.

        Raises:
            ConfigError: The mask says something else about older columns, or a row has no token.
        """
        mask_BC = self._new_mask(input_ids_BC.cpu(), attention_mask)
        ids_BC = input_ids_BC.cpu()
        tokens = [ids[mask].tolist() for ids, mask in zip(ids_BC, mask_BC, strict=True)]
        keep = min(keep or ids_BC.shape[1], ids_BC.shape[1])
        kept_BK = mask_BC[:, -keep:]
        sources = list(range(len(tokens)))
        if self._sequences is None:
            self._open(tokens, int((~mask_BC).sum(1).min()))
            sources = _first_alike(tokens, mask_BC)
        assert self._sequences is not None
        own = [source == row for row, source in enumerate(sources)]
        wanted = [count if mine else 0 for count, mine in zip(kept_BK.sum(1).tolist(), own, strict=True)]
        given = [ids if mine else [] for ids, mine in zip(tokens, own, strict=True)]
        rows_RV = self._sequences.extend(given, wanted)
        self._sequences.reorder(sources)
        # Made out here: what is made in inference mode could not be written to by logits processors.
        logits = torch.zeros(*kept_BK.shape, rows_RV.shape[1], device=rows_RV.device)
        logits[kept_BK & torch.tensor(own)[:, None]] = rows_RV
        self._mask_BS = torch.cat([self._mask_BS, mask_BC], dim=1)
        return logits if all(own) else logits[sources]

    def _new_mask(self, ids_BC: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        columns = ids_BC.shape[1]
        before = self.get_seq_length()
        if attention_mask is not None and before and attention_mask.shape[-1] == before + columns:
            attention_mask = attention_mask.cpu()
            if not torch.equal(mask_of(self._mask_BS, attention_mask[:, :before]), self._mask_BS):
                raise ConfigError("The attention mask differs from that with which the cache was filled.")
            attention_mask = attention_mask[:, before:]
        return mask_of(ids_BC, None if attention_mask is None else attention_mask.cpu())

    def _open(self, tokens: list[list[int]], padding: int) -> None:
        if self._closed:
            raise ConfigError("This cache is closed: make a new one with `new_cache`.")
        if not all(tokens):
            raise ConfigError("A row of the batch has no token: a prompt needs at least one.")
        self._sequences = self._decoder.open(self.max_tokens - padding, len(tokens))
        if self._keeper is not None:
            self._keeper.keep(self, self._sequences)
        self._mask_BS = torch.empty(len(tokens), 0, dtype=torch.bool)

    def close(self) -> None:
        """Give all memory back; may be called twice."""
        self._closed = True
        if self._sequences is not None:
            self._sequences.close()

    # --- for `generate` ---------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (all blocks hold the same tokens)
        """Columns so far, padding included."""
        return int(self._mask_BS.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Most columns of a row."""
        return self.max_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row go on from another one's past."""
        if self._sequences is not None:
            self._sequences.reorder(beam_idx.tolist())
            self._mask_BS = self._mask_BS[beam_idx.cpu()]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; a negative number, as in transformers.

        Raises:
            ConfigError: It is positive, or there are not so many.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self.get_seq_length():
            raise ConfigError(f"crop({tokens_to_remove}) of a cache with {self.get_seq_length()} columns.")
        if not count or self._sequences is None:
            return
        removed = self._mask_BS[:, -count:].sum(1).tolist()
        self._sequences.rollback([held - less for held, less in zip(self._sequences.lengths, removed, strict=True)])
        self._mask_BS = self._mask_BS[:, :-count]

    def reset(self) -> None:
        """Forget everything."""
        self.crop(-self.get_seq_length())

    def activate_past_recording(self) -> None:
        """Nothing to do: any column can be taken back."""

    @property
    def is_croppable(self) -> bool:
        """Always."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """Never: every token of the past counts, whichever blocks hold it."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """Never."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether memory is set aside."""
        return self._sequences is not None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """A split cache has as many rows as it was opened with.

        Raises:
            ConfigError: Always, if rows would be added.
        """
        if repeats != 1 and self._sequences is not None:
            raise ConfigError("A cache that is in use cannot get more rows: give the whole prompt without it.")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Let rows go on from others; their number stays.

        Raises:
            ConfigError: The number would change.
        """
        if len(indices) != len(self._mask_BS):
            raise ConfigError("A cache that is in use cannot lose rows.")
        self.reorder_cache(indices)


class CacheKeeper:
    """Closes the caches of a model that nobody closed: forgotten ones when the next is made, all at the model's end."""

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[SplitCache] = weakref.WeakSet()
        self._forgotten: deque[Sequences] = deque()

    def keep(self, cache: SplitCache, sequences: Sequences) -> None:
        """From now on look after a cache, whose sequences these are."""
        self._kept.add(cache)
        # Nothing more in a finaliser: it may run while its thread holds the locks that closing takes.
        weakref.finalize(cache, self._forgotten.append, sequences).atexit = False

    def sweep(self) -> None:
        """Close what was forgotten."""
        while self._forgotten:
            self._forgotten.popleft().close()

    def close(self) -> None:
        """Close everything."""
        for cache in list(self._kept):
            cache.close()
        self.sweep()


def _first_alike(tokens: list[list[int]], mask_BC: torch.Tensor) -> list[int]:
    """For each row the first one that is the same: beams and return sequences begin alike, and run once."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    keys = [(tuple(ids), tuple(mask.tolist())) for ids, mask in zip(tokens, mask_BC, strict=True)]
    return [first.setdefault(key, row) for row, key in enumerate(keys)]
