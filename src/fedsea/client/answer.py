"""What is asked of an answer, and what is known of it; without torch, so that a command can refuse a value at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.model.sampling import Sampling

_LEAST_TEMPERATURE = 1e-4
"""Below it logits overflow before they are compared."""
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
"""Of repetition: far beyond them logits overflow, or all tokens that occurred become alike."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is made.

    Attributes:
        max_new_tokens: Most tokens of the answer.
        temperature: 0 takes the likeliest token each time; else logits are divided by it.
        top_k: Draw among so many of the likeliest; 0: among all.
        top_p: Draw among the likeliest that have so much probability together.
        min_p: Draw among those with at least this share of the likeliest one's probability.
        repetition_penalty: Over 1 makes tokens that occurred, in prompt or answer, less likely; from 0.01 to 100.
        seed: The same one gives the same answer, whatever is drafted; None: another answer each time.
        stop_tokens: Ids that end the answer; they are not part of it.
        num_logprobs: -1: none; 0: the chosen token's; n: and those of the n likeliest. They are the model's own, before
            temperature and the like.

    Raises:
        ConfigError: A value cannot work; the message says what can.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()
    num_logprobs: int = -1

    def __post_init__(self) -> None:
        temperature = self.temperature
        allowed = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                temperature == 0 or (math.isfinite(temperature) and temperature >= _LEAST_TEMPERATURE),
                f"0 (the likeliest token) or from {_LEAST_TEMPERATURE:g} on",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            (
                "repetition_penalty",
                LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
                f"from {LEAST_PENALTY:g} to {MOST_PENALTY:g}; 1 is off",
            ),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits"),
            ("num_logprobs", self.num_logprobs >= -1, "-1 (none) or more"),
        )
        for name, right, sentence in allowed:
            if not right:
                raise ConfigError(f"{name} must be {sentence}.")

    @property
    def sampling(self) -> Sampling:
        """What a sampler needs of it."""
        from fedsea.model.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of an answer.

    Attributes:
        id: The token.
        logprob: Its log-probability, if asked for.
        top: The likeliest tokens with theirs, if asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class GenerationStats:
    """What an answer took, so far.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them that the sequence held already.
        new_tokens: Tokens given out.
        round_trips: Times that the trunk was waited for.
        drafted: Tokens that were drafted and sent.
        accepted: Those of them that the model agreed with.
        first_token_s: Time to the first token.
        seconds: Time spent here and waiting for the trunk; not what the caller did between tokens.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    round_trips: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one, or all over all if there is but one trip."""
        after_s = self.seconds - self.first_token_s
        if self.new_tokens > 1 and after_s > 0:
            return (self.new_tokens - 1) / after_s
        return self.new_tokens / self.seconds if self.seconds else 0.0
