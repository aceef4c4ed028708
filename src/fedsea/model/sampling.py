"""The next token from logits, and how many drafted tokens a model agrees with.

Logits are changed by transformers' own processors, in `generate`'s order, and a seeded draw consumes its generator as
`generate` does: with the same seed both give the same tokens.

    R  rows of logits, V  vocabulary size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.generation import logits_process as hf

from fedsea.errors import NonFiniteError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; values are checked by whoever takes them from a user.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: Only so many of the likeliest; 0: all.
        top_p: Only the likeliest that have so much probability together.
        min_p: Only those with at least this share of the likeliest one's probability.
        repetition_penalty: Divides the logits of tokens that occurred.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        tokens: Drafted ids.
        probabilities: What each was drawn from, [V] each; None: nothing was drawn, or with the randomness that the
            model's own tokens will have (`Sampler.couples`).
    """

    tokens: Sequence[int]
    probabilities: Sequence[torch.Tensor] | None = None


class Sampler:
    """Chooses tokens for one sequence.

    Args:
        how: See `Sampling`.
        seed: Of a generator of its own; None takes one from the system.
        device: Where logits are.
    """

    def __init__(self, how: Sampling, seed: int | None = None, device: torch.device | str = "cpu") -> None:
        self.how = how
        self.seeded = seed is not None
        self.greedy = how.temperature == 0
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._penalty = (
            None if how.repetition_penalty == 1 else hf.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)
        )
        self._warpers = [] if self.greedy else list(_warpers(how))

    @property
    def couples(self) -> bool:
        """Whether drafts that `ahead` chose are those that this sampler would choose from the same logits."""
        return self.greedy or self.seeded

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return self._generator.device

    def ahead(self) -> Sampler:
        """A sampler to choose drafts with, from another model's logits; this one stays as it is.

        With a seed it draws what this one is going to draw. So the two models agree as soon as their probabilities are
        alike, and a seed gives the same text whatever is drafted. Without a seed it draws on its own, and the draft
        must bring its probabilities: then more of it is accepted.
        """
        other = Sampler(self.how, 0 if self.seeded else None, self.device)
        if self.seeded:
            other._generator.set_state(self._generator.get_state())
        return other

    def scores(self, tokens: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after penalty and warping.

        Args:
            tokens: Everything before the token that is to be chosen.
            logits_V: The model's.
        """
        scores_1V = logits_V[None]
        ids_1T = torch.empty(1, 0, dtype=torch.long)
        if self._penalty is not None:
            ids_1T = torch.tensor(tokens, device=logits_V.device)[None]
            scores_1V = self._penalty(ids_1T, scores_1V)
        for warper in self._warpers:
            scores_1V = warper(ids_1T, scores_1V)
        return scores_1V

    def probabilities(self, tokens: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        """Probabilities [1, V] of the next token; arguments as for `scores`."""
        return torch.softmax(self.scores(tokens, logits_V), dim=-1)

    def choose(self, tokens: Sequence[int], logits_V: torch.Tensor) -> int:
        """The next token; arguments as for `scores`."""
        if self.greedy:
            return int(self.scores(tokens, logits_V).argmax())
        return self.draw(self.probabilities(tokens, logits_V))

    def draw(self, probabilities_1V: torch.Tensor) -> int:
        """A token with these probabilities."""
        return int(torch.multinomial(probabilities_1V, 1, generator=self._generator))

    def verify(self, tokens: Sequence[int], logits_RV: torch.Tensor, draft: Draft) -> list[int]:
        """The drafted tokens that the model takes, and one more of its own.

        Whatever is drafted, tokens come with the model's own probabilities (greedy: they are the model's own).

        Args:
            tokens: Everything before the draft.
            logits_RV: Of the token after the last one, and after each drafted one: R is one more than the draft has.
            draft: What was drafted.

        Raises:
            NonFiniteError: Logits are NaN or infinite.
        """
        likeliest_R = logits_RV.max(dim=-1)
        if not torch.isfinite(likeliest_R.values).all():
            raise NonFiniteError("The model's logits are not finite: use bf16 or fp32 instead of fp16.")
        drafted = list(draft.tokens)
        if self.greedy and self._penalty is None:
            return _agreed(likeliest_R.indices.tolist(), drafted)
        if draft.probabilities is not None and not self.greedy:
            return self._verify_drawn(tokens, logits_RV, drafted, draft.probabilities)
        # A draft d that is certain: to draw from p and go on if it is d accepts with probability p(d), and else leaves
        # a draw from p without d. It takes one draw a token, as without drafts: a seed gives the same tokens.
        taken: list[int] = []
        for number, logits_V in enumerate(logits_RV):
            taken.append(self.choose([*tokens, *taken] if self._penalty else (), logits_V))
            if number == len(drafted) or taken[-1] != drafted[number]:
                break
        return taken

    def _verify_drawn(
        self, tokens: Sequence[int], logits_RV: torch.Tensor, drafted: list[int], drawn_from: Sequence[torch.Tensor]
    ) -> list[int]:
        """Speculative sampling: accept with min(1, p/q), else draw from max(0, p − q) (arXiv 2211.17192)."""
        taken: list[int] = []
        for token, q_V, logits_V in zip(drafted, drawn_from, logits_RV[:-1], strict=True):
            p_1V = self.probabilities([*tokens, *taken] if self._penalty else (), logits_V)
            p, q = float(p_1V[0, token]), float(q_V[token])
            if self._uniform() * q >= p:
                rest_1V = (p_1V - q_V[None]).clamp_(min=0)
                # Nothing is left only where p and q are equal but for rounding.
                return [*taken, self.draw(rest_1V if float(rest_1V.sum()) > 0 else p_1V)]
            taken.append(token)
        return [*taken, self.choose([*tokens, *taken] if self._penalty else (), logits_RV[-1])]

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self._generator, device=self.device, dtype=torch.float64))


def _agreed(own: list[int], drafted: list[int]) -> list[int]:
    """The model's own tokens up to the first one that was not drafted.

    >>> _agreed([5, 6, 7], [5, 9])
    [5, 6]
    """
    for number, token in enumerate(drafted):
        if own[number] != token:
            return own[: number + 1]
    return own


def _warpers(how: Sampling) -> list[hf.LogitsProcessor]:
    """In `generate`'s order."""
    found: list[hf.LogitsProcessor] = []
    if how.temperature != 1:
        found.append(hf.TemperatureLogitsWarper(float(how.temperature)))
    if how.top_k:
        found.append(hf.TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        found.append(hf.TopPLogitsWarper(float(how.top_p)))
    if how.min_p > 0:
        found.append(hf.MinPLogitsWarper(float(how.min_p)))
    return found


def logprobs(logits_V: torch.Tensor, token: int, most: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of a token, and the likeliest ones with theirs, before any warping."""
    logs_V = torch.log_softmax(logits_V, dim=-1)
    found = torch.topk(logs_V, min(most, logs_V.shape[0]))
    return float(logs_V[token]), tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
