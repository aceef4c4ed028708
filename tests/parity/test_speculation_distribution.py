"""Whatever is drafted, tokens come with the model's own probabilities; the test finds rules that are wrong."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fedsea.model.sampling import Draft, Sampler, Sampling
from tests.parity.chi_square import unlikely

VOCAB = 4
RUNS = 2500
LOGITS_VV = torch.tensor([[0.1, 1.2, -0.5, 0.7], [1.0, 0.0, 0.3, -1.0], [-0.2, 0.4, 0.9, 0.1], [0.6, -0.3, 0.2, 1.1]])
OTHER_VV = LOGITS_VV.flip(1)
"""What a draft model thinks, by the last token."""
OTHER_LIKELIEST, OTHER_PROBABILITIES = OTHER_VV.argmax(-1).tolist(), tuple(OTHER_VV.softmax(-1))
OTHER_WEIGHTS = [q_V.tolist() for q_V in OTHER_PROBABILITIES]


class AcceptsAll(Sampler):
    """Wrong: the draft is the answer."""

    def verify(self, tokens, logits_RV, draft):
        return [*draft.tokens, self.choose(tokens, logits_RV[-1])]


class DrawsAnew(Sampler):
    """Wrong: after a rejection it draws from p, which may give the rejected token once more."""

    def draw(self, probabilities_1V):
        if abs(float(probabilities_1V.sum()) - 1) > 1e-4:  # a residual
            probabilities_1V = self._p_1V
        return super().draw(probabilities_1V)

    def probabilities(self, tokens, logits_V):
        self._p_1V = super().probabilities(tokens, logits_V)
        return self._p_1V


class AsksTwice(Sampler):
    """Wrong: a draft that was rejected gets a second chance."""

    def verify(self, tokens, logits_RV, draft):
        taken = super().verify(tokens, logits_RV, draft)
        return taken if len(taken) > 1 else super().verify(tokens, logits_RV, draft)


def _certain(draw, last):
    return OTHER_LIKELIEST[last], None


def _drawn(draw, last):
    return draw.choices(range(VOCAB), OTHER_WEIGHTS[last])[0], OTHER_PROBABILITIES[last]


def _counts(sampler, drafter, most=2, runs=RUNS):
    """Triples of tokens after a 0, by trips of up to `most` drafts."""
    draw = random.Random(99)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(runs):
        text = [0]
        while len(text) < 4:
            drafts, drawn_from = [], []
            for _ in range(most):
                token, q_V = drafter(draw, (text + drafts)[-1])
                drafts.append(token)
                drawn_from.append(q_V)
            logits_RV = LOGITS_VV[[text[-1], *drafts]]
            draft = Draft(drafts, None if drawn_from[0] is None else drawn_from)
            text += sampler.verify(text, logits_RV, draft)
        answer = tuple(text[1:4])
        counts[answer] = counts.get(answer, 0) + 1
    return counts


def _exact(how):
    sampler = Sampler(how, 0)
    table = torch.cat([sampler.probabilities([0], logits_V) for logits_V in LOGITS_VV])
    return {
        (a, b, c): float(table[0, a] * table[a, b] * table[b, c])
        for a, b, c in itertools.product(range(VOCAB), repeat=3)
        if table[0, a] * table[a, b] * table[b, c] > 0
    }


HOW = {"plain": Sampling(1.0), "warped": Sampling(0.8, top_k=3, top_p=0.95)}


@pytest.mark.parametrize("drafter", [_certain, _drawn])
@pytest.mark.parametrize("how", HOW)
def test_tokens_have_the_models_probabilities(how, drafter):
    assert not unlikely(_counts(Sampler(HOW[how], 1), drafter), _exact(HOW[how]), at=1e-4)


@pytest.mark.parametrize(
    ("wrong", "drafter"),
    [(AcceptsAll, _certain), (AcceptsAll, _drawn), (DrawsAnew, _drawn), (AsksTwice, _certain), (AsksTwice, _drawn)],
)
def test_a_wrong_rule_is_found(wrong, drafter):
    """Even by fewer runs than the right rule has to stand."""
    counts = _counts(wrong(HOW["plain"], 1), drafter, runs=RUNS // 2)
    assert unlikely(counts, _exact(HOW["plain"]), at=1e-9)


def test_the_standard_rule_accepts_what_both_models_have_in_common():
    """The share of accepted first drafts is the sum over tokens of the smaller probability."""
    sampler, draw = Sampler(HOW["plain"], 1), random.Random(5)
    accepted = 0
    for _ in range(RUNS):
        token, q_V = _drawn(draw, 0)
        accepted += len(sampler.verify([0], LOGITS_VV[[0, token]], Draft([token], [q_V]))) == 2
    p, q = LOGITS_VV[0].softmax(-1), OTHER_VV[0].softmax(-1)
    assert accepted / RUNS == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.04)


def test_a_seed_draws_drafts_and_tokens_alike():
    """A draft model with the same logits is always right, and the model's own draws are not moved by asking it."""
    sampler, apart = Sampler(HOW["plain"], 7), Sampler(HOW["plain"], 7)
    for last in (0, 1, 2, 3, 0):
        ahead = sampler.ahead()
        drafts = [ahead.choose([], LOGITS_VV[last]), ahead.choose([], LOGITS_VV[last])]
        taken = sampler.verify([last], LOGITS_VV[[last, last, last]], Draft(drafts))
        assert taken[:2] == drafts
        assert taken == [apart.choose([], LOGITS_VV[last]) for _ in range(3)]


def test_without_a_seed_drafts_are_drawn_apart_from_tokens():
    """The standard rule needs drafts that say nothing about the draws that judge them."""
    sampler, uniform_1V = Sampler(HOW["plain"]), torch.full((1, 100), 0.01)
    aheads = [sampler.ahead(), sampler.ahead(), sampler]
    draws = {tuple(one.draw(uniform_1V) for _ in range(20)) for one in aheads}
    assert len(draws) == 3
