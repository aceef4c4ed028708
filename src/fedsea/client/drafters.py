"""What may come next, guessed on this side of the wire: copied from the text, or said by a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedsea.client.decoding import SplitDecoder
from fedsea.errors import ConfigError
from fedsea.model.cache import Extension
from fedsea.model.draft_model import DraftModel, common
from fedsea.model.sampling import Draft, Sampler


class Drafting(Protocol):
    """A drafter at work on one text."""

    def draft(self, tokens: Sequence[int], most: int, sampler: Sampler) -> Draft:
        """Up to `most` tokens that may follow.

        Args:
            tokens: Prompt and answer so far; from call to call it only grows.
            most: At least 1.
            sampler: How the model's own tokens are going to be chosen; left as it is.
        """
        ...

    def close(self) -> None:
        """Give its memory back; may be called twice."""
        ...


class Drafter(Protocol):
    """Drafts tokens. One object serves any number of texts, from any number of threads.

    Attributes:
        most: Most drafts of a round trip.
    """

    most: int

    def begin(self, max_tokens: int, vocab_size: int) -> Drafting:
        """Start on a text of at most so many tokens, for a model with such a vocabulary."""
        ...


# --- copies ---------------------------------------------------------------------------------------------------------


class PromptLookup:
    """Drafts what followed the last tokens when they occurred before, in prompt or answer; costs next to nothing.

    Args:
        max_ngram: Longest run of last tokens that is looked up; shorter ones follow.
        most: Most drafts of a round trip.
    """

    def __init__(self, max_ngram: int = 3, most: int = 15) -> None:
        if max_ngram < 1 or most < 1:
            raise ConfigError("max_ngram and most must be at least 1.")
        self.max_ngram = max_ngram
        self.most = most

    def begin(self, max_tokens: int, vocab_size: int) -> Drafting:  # noqa: ARG002 (it copies what is there)
        """See `Drafter.begin`."""
        return _Lookup(self.max_ngram)


class _Lookup:
    """An index of n-grams that grows with the text: constant work for each token."""

    def __init__(self, max_ngram: int) -> None:
        self._followed_at: dict[tuple[int, ...], int] = {}
        self._sizes = range(max_ngram, 0, -1)
        self._indexed = 1

    def draft(self, tokens: Sequence[int], most: int, sampler: Sampler) -> Draft:  # noqa: ARG002 (it copies)
        """See `Drafting.draft`."""
        count = len(tokens)
        for follower in range(self._indexed, count):
            for size in self._sizes:
                if size <= follower:
                    self._followed_at[tuple(tokens[follower - size : follower])] = follower
        self._indexed = max(self._indexed, count)
        for size in self._sizes:
            at = self._followed_at.get(tuple(tokens[count - size :])) if size <= count else None
            if at is not None:
                return Draft(_copied(tokens, at, most))
        return Draft(())

    def close(self) -> None:
        """Nothing to give back."""


def _copied(tokens: Sequence[int], start: int, most: int) -> list[int]:
    """So many tokens from a place on; a copy that reaches the end of the text goes on with what it has copied.

    >>> _copied([1, 2, 3, 1], 1, 2), _copied([7, 8, 7], 1, 5)
    ([2, 3], [8, 7, 8, 7, 8])
    """
    period = len(tokens) - start
    return [tokens[start + number % period] for number in range(most)]


# --- models ---------------------------------------------------------------------------------------------------------


def _said(
    next_logits: Callable[[Sequence[int]], torch.Tensor], tokens: Sequence[int], most: int, sampler: Sampler
) -> Draft:
    """What a model would say, chosen as the large model's tokens are."""
    text, ahead, drawn = list(tokens), sampler.ahead(), []
    for _ in range(most):
        logits_V = next_logits(text)
        if sampler.couples:
            text.append(ahead.choose(text, logits_V))
            continue
        probabilities_1V = ahead.probabilities(text, logits_V)
        text.append(ahead.draw(probabilities_1V))
        drawn.append(probabilities_1V[0])
    return Draft(text[len(tokens) :], None if sampler.couples else drawn)


class ModelDrafter:
    """Drafts with a small model that has the large one's tokenizer.

    Args:
        model_path: Folder of a Hugging Face causal language model.
        tokenizer: The large model's; given, the small model's must have the same tokens.
        device: Where the small model runs.
        dtype: Its type; "auto" takes the checkpoint's.
        most: Most drafts of a round trip.

    Raises:
        ConfigError: It cannot be loaded or cannot draft, or its tokenizer is another one.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        dtype: str = "auto",
        most: int = 8,
    ) -> None:
        self.most = most
        self._model = DraftModel(str(model_path), dtype=dtype, device=device)
        if tokenizer is not None:
            _check_tokenizer(str(model_path), tokenizer)

    def begin(self, max_tokens: int, vocab_size: int) -> Drafting:  # noqa: ARG002 (its cache grows by itself)
        """See `Drafter.begin`."""
        return _Model(self._model, vocab_size)


def _check_tokenizer(path: str, tokenizer: Any) -> None:
    from fedsea.data.tokenizer import load_tokenizer

    if load_tokenizer(path, vocab_size=None).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"The draft model in {path} has another tokenizer: take one of the same family.")


class _Model:
    def __init__(self, model: DraftModel, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._text = model.open()
        self._agreed = 0

    def draft(self, tokens: Sequence[int], most: int, sampler: Sampler) -> Draft:
        """See `Drafting.draft`."""
        limit, size = self._model.max_tokens, self._model.vocab_size
        if (limit is not None and len(tokens) + most > limit) or max(tokens[self._agreed :], default=0) >= size:
            return Draft(())

        def next_logits(text: Sequence[int]) -> torch.Tensor:
            logits_V = self._text.next(text, self._agreed)
            missing = self._vocab_size - logits_V.shape[0]  # embeddings are padded to sizes of their own
            return torch.nn.functional.pad(logits_V, (0, missing), value=float("-inf")).to(sampler.device)

        draft = _said(next_logits, tokens, most, sampler)
        self._agreed = len(tokens)
        return draft

    def close(self) -> None:
        """Forget the text."""
        self._text = self._model.open()


class EarlyExit:
    """Drafts with what the client has anyway: its output blocks right behind its input blocks.

    Args:
        decoder: The split model.
        most: Most drafts of a round trip.
    """

    def __init__(self, decoder: SplitDecoder, most: int = 4) -> None:
        self.most = most
        self._decoder = decoder

    def begin(self, max_tokens: int, vocab_size: int) -> Drafting:  # noqa: ARG002 (it has the model's own head)
        """See `Drafter.begin`."""
        return _Exit(self._decoder, max_tokens)


class _Exit:
    def __init__(self, decoder: SplitDecoder, max_tokens: int) -> None:
        self._decoder = decoder
        segments = decoder.segments
        with decoder.lock:
            self._caches = segments.input_blocks.open_cache(max_tokens), segments.output_blocks.open_cache(max_tokens)
        self._held: list[int] = []
        self._agreed = 0

    def draft(self, tokens: Sequence[int], most: int, sampler: Sampler) -> Draft:
        """See `Drafting.draft`."""
        draft = _said(self._next, tokens, most, sampler)
        self._agreed = len(tokens)
        return draft

    @torch.inference_mode()
    def _next(self, text: Sequence[int]) -> torch.Tensor:
        kept = common(self._held, text, self._agreed)
        del self._held[kept:]
        for cache in self._caches:
            cache.rollback(kept)
        step = self._decoder.plan.inference.prefill_tokens
        logits_1V = torch.empty(0)
        for start in range(kept, len(text), step):  # in pieces: others wait for the lock
            logits_1V = self._run(text[start : start + step])
        return logits_1V[0].float()

    def _run(self, new: Sequence[int]) -> torch.Tensor:
        decoder, segments = self._decoder, self._decoder.segments
        with decoder.lock:
            entering, leaving = (Extension((len(new),), (cache,)) for cache in self._caches)
            ids_T = torch.tensor(new, device=segments.device)
            hidden_TH = segments.input_blocks.extend(ids_T, entering, decoder.input_adapters)
            logits_1V = segments.output_blocks.extend(hidden_TH, leaving, decoder.output_adapters)
            entering.commit()
            leaving.commit()
        self._held += new
        return logits_1V

    def close(self) -> None:
        """See `Drafting.close`."""
        with self._decoder.lock:
            for cache in self._caches:
                cache.close()
