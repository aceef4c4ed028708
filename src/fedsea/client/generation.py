"""Text from a split model, token by token: one round trip for each, or for several that were drafted here.

>>> with generate(decoder, prompt, GenerationSettings(max_new_tokens=64)) as generation:   # doctest: +SKIP
...     for token in generation:
...         print(token.id)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence

import torch

from fedsea.client.answer import GeneratedToken, GenerationSettings, GenerationStats
from fedsea.client.decoding import Sequences, SplitDecoder
from fedsea.client.drafters import Drafter, Drafting
from fedsea.client.pace import Pace
from fedsea.errors import ConfigError
from fedsea.model.sampling import Draft, Sampler, logprobs

__all__ = ["GeneratedToken", "Generation", "GenerationSettings", "GenerationStats", "generate"]


class Generation:
    """An answer as it comes: an iterator of `GeneratedToken`. Made by `generate`.

    It gives its memory back, here and at the trunk's owner, when it ends, fails, is closed or is forgotten.

    Attributes:
        stats: See `GenerationStats`.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._tokens = run.tokens()  # refers to `run`, not to this object: forgetting it closes the generator
        self.stats = run.stats

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, "stop" (a stop token) or "length" (`max_new_tokens`); None: it has not."""
        return self._run.finish_reason

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> GeneratedToken:
        return next(self._tokens)

    def close(self) -> None:
        """End here; may be called twice. Sequences that were handed to `generate` stay open."""
        self._tokens.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def generate(
    decoder: SplitDecoder,
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    drafter: Drafter | None = None,
    sequences: Sequences | None = None,
) -> Generation:
    """Continue a prompt; nothing is computed before the first token is asked for.

    Args:
        decoder: The split model.
        prompt: Token ids, at least one.
        settings: How.
        drafter: Drafts tokens, so that a round trip may give several; None: one at a time. It changes how fast tokens
            come, not which: greedy or seeded ones are the same, others have the same probabilities.
        sequences: One sequence to be used, which stays open. What it holds as a common prefix with the prompt is not
            computed again; the rest of what it holds is forgotten.

    Raises:
        ConfigError: The prompt is empty, or with the answer too long, or `sequences` are several.
    """
    if not prompt:
        raise ConfigError("The prompt is empty: give at least one token (the tokenizer's begin-of-text token will do).")
    total = len(prompt) + settings.max_new_tokens
    most = decoder.max_tokens if sequences is None else sequences.max_tokens
    if total > most:
        raise ConfigError(
            f"Prompt and answer together may have {most} tokens here, and {len(prompt)} and up to "
            f"{settings.max_new_tokens} were asked for: shorten the prompt, or ask for a shorter answer "
            "(--max-new-tokens; max_new_tokens in Python)."
        )
    if sequences is not None and len(sequences.lengths) != 1:
        raise ConfigError("An answer needs sequences of one: open them with num_sequences=1.")
    return Generation(_Run(decoder, list(prompt), settings, drafter, sequences))


class _Run:
    """The loop of one generation."""

    def __init__(
        self,
        decoder: SplitDecoder,
        tokens: list[int],
        settings: GenerationSettings,
        drafter: Drafter | None,
        sequences: Sequences | None,
    ) -> None:
        self.stats = GenerationStats(len(tokens))
        self.finish_reason: str | None = None
        self._decoder = decoder
        self._all = tokens
        self._settings = settings
        self._drafter = drafter
        self._given = sequences
        self._sampler = Sampler(settings.sampling, settings.seed, decoder.segments.device)
        self._stop = frozenset(settings.stop_tokens)
        self._pace = Pace(0 if drafter is None else drafter.most)

    def tokens(self) -> Generator[GeneratedToken, None, None]:
        """The answer; sequences and drafter are open for as long as this runs."""
        with contextlib.ExitStack() as stack:
            began = time.perf_counter()
            length = len(self._all) + self._settings.max_new_tokens
            sequences = self._given or stack.enter_context(self._decoder.open(length))
            self._reuse(sequences)
            drafting: Drafting | None = None
            while self.finish_reason is None:
                if self.stats.round_trips and drafting is None and self._drafter is not None:
                    begun = self._drafter.begin(length, self._decoder.vocab_size)
                    drafting = stack.enter_context(contextlib.closing(begun))
                draft = Draft(()) if drafting is None else self._draft(drafting)
                found = self._trip(sequences, draft)
                now = time.perf_counter()
                self.stats.seconds += now - began
                self.stats.first_token_s = self.stats.first_token_s or self.stats.seconds
                yield from self._counted(found)
                began = time.perf_counter()

    def _counted(self, found: list[GeneratedToken]) -> Generator[GeneratedToken, None, None]:
        for token in found:
            self.stats.new_tokens += 1
            yield token

    def _reuse(self, sequences: Sequences) -> None:
        """Go back to where the sequence still agrees with the prompt, whose last token at least is to be run."""
        held, kept = sequences.tokens[0], 0
        for mine, theirs in zip(held, self._all[:-1], strict=False):
            if mine != theirs:
                break
            kept += 1
        self.stats.cached_tokens = kept
        if kept < len(held):
            sequences.rollback([kept])

    def _draft(self, drafting: Drafting) -> Draft:
        # The last token needs no draft after it: a trip always gives one of the model's own.
        left = self.stats.prompt_tokens + self._settings.max_new_tokens - len(self._all) - 1
        most = min(self._pace.choose(), left)
        if most < 1:
            return Draft(())
        began = time.perf_counter()
        draft = drafting.draft(self._all, most, self._sampler)
        self._pace.drafted(len(draft.tokens), time.perf_counter() - began)
        return draft

    def _trip(self, sequences: Sequences, draft: Draft) -> list[GeneratedToken]:
        """One round trip: run what is not in the cache and the draft, take what the model agrees with."""
        drafted = len(draft.tokens)
        new = [*self._all[sequences.lengths[0] :], *draft.tokens]
        began = time.perf_counter()
        logits_RV = sequences.extend([new], [drafted + 1])
        if self.stats.round_trips:  # the first one is the prompt's
            self._pace.tripped(len(new), time.perf_counter() - began)
        taken = self._sampler.verify(self._all, logits_RV, draft)
        self._all += taken
        if len(taken) <= drafted:
            sequences.rollback([len(self._all) - 1])
        self.stats.round_trips += 1
        self.stats.drafted += drafted
        self.stats.accepted += len(taken) - 1
        self._pace.verified(drafted, len(taken) - 1)
        return self._finish(taken, logits_RV)

    def _finish(self, taken: list[int], logits_RV: torch.Tensor) -> list[GeneratedToken]:
        """The tokens as they are given out, up to a stop."""
        found: list[GeneratedToken] = []
        for token, logits_V in zip(taken, logits_RV, strict=False):
            if token in self._stop:
                self.finish_reason = "stop"
                return found
            found.append(self._described(token, logits_V))
        if len(self._all) - self.stats.prompt_tokens >= self._settings.max_new_tokens:
            self.finish_reason = "length"
        return found

    def _described(self, token: int, logits_V: torch.Tensor) -> GeneratedToken:
        if self._settings.num_logprobs < 0:
            return GeneratedToken(token)
        return GeneratedToken(token, *logprobs(logits_V, token, self._settings.num_logprobs))
