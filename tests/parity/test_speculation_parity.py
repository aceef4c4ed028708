"""Drafts change how many round trips an answer takes, and nothing else."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from fedsea.client.drafters import EarlyExit, ModelDrafter, PromptLookup
from fedsea.client.generation import GenerationSettings, generate
from fedsea.errors import ConfigError
from fedsea.model.sampling import Draft, Sampler, Sampling
from tests.parity.chi_square import unlikely
from tests.parity.test_decoding_parity import _decoder as make_decoder

NEW = 40
PROMPT = [5, 17, 33, 5, 17, 60, 5, 17, 33]
SETTINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "seeded": {"temperature": 0.8, "seed": 11},
    "warped": {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 4},
}


class Oracle:
    """Drafts a known answer, with every third token wrong."""

    def __init__(self, answer, most=6):
        self.answer = answer
        self.most = most
        self.open = 0

    def begin(self, max_tokens, vocab_size):
        self.open += 1
        return self

    def draft(self, tokens, most, sampler):
        at = len(tokens) - len(PROMPT)
        drafts = self.answer[at : at + most]
        return Draft([token if number % 3 != 2 else (token + 1) % 97 for number, token in enumerate(drafts)])

    def close(self):
        self.open -= 1


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    zoo.save(zoo.config("llama"), path)
    return path


@pytest.fixture(scope="module")
def decoder(folder):
    return make_decoder(folder)


@pytest.fixture(scope="module")
def small(zoo, tmp_path_factory):
    """A draft model with another number of blocks and a smaller vocabulary."""
    path = tmp_path_factory.mktemp("small")
    zoo.save(zoo.config("qwen2", num_hidden_layers=2, vocab_size=90), path)
    return path


def _answer(decoder, drafter=None, **settings):
    with generate(decoder, PROMPT, GenerationSettings(NEW, **settings), drafter=drafter) as generation:
        return [token.id for token in generation], generation.stats


def _drafters(decoder, folder, small, answer):
    return {
        "lookup": PromptLookup(),
        "same model": ModelDrafter(folder),
        "small model": ModelDrafter(small),
        "early exit": EarlyExit(decoder),
        "oracle": Oracle(answer),
    }


@pytest.mark.parametrize("how", SETTINGS)
def test_tokens_are_the_same_whatever_is_drafted(decoder, folder, small, how):
    expected, plain = _answer(decoder, **SETTINGS[how])
    assert plain.round_trips == NEW == len(expected)
    for name, drafter in _drafters(decoder, folder, small, expected).items():
        found, stats = _answer(decoder, drafter, **SETTINGS[how])
        assert found == expected, name
        assert stats.new_tokens == NEW == stats.round_trips + stats.accepted, name
    assert decoder.segments.input_blocks.arena.pages == decoder.segments.output_blocks.arena.pages == 0
    assert decoder.trunk._passes.trunk.arena.pages == 0


@pytest.mark.parametrize("how", SETTINGS)
def test_a_drafter_that_is_the_model_itself_is_always_right(decoder, folder, how):
    drafter = ModelDrafter(folder, most=4)
    _, stats = _answer(decoder, drafter, **SETTINGS[how])
    assert stats.accepted == stats.drafted > 0
    assert stats.round_trips < NEW


def test_right_drafts_save_round_trips_and_the_drafter_is_closed(decoder):
    drafter = Oracle(_answer(decoder)[0])
    _, stats = _answer(decoder, drafter)
    assert stats.round_trips < NEW / 1.5
    assert drafter.open == 0


def test_a_stop_token_among_accepted_drafts_ends_the_answer_there(decoder):
    expected, _ = _answer(decoder)
    stop = expected[7]
    for drafter in (None, Oracle(expected)):
        settings = GenerationSettings(NEW, stop_tokens=(stop,))
        with generate(decoder, PROMPT, settings, drafter=drafter) as generation:
            assert [token.id for token in generation] == expected[: expected.index(stop)]
            assert generation.finish_reason == "stop"


def test_logprobs_are_those_of_single_steps(decoder):
    expected, _ = _answer(decoder)
    plain, drafted = (torch.tensor(list(_described(decoder, drafter))) for drafter in (None, Oracle(expected)))
    torch.testing.assert_close(drafted, plain, rtol=1e-4, atol=1e-4)


def _described(decoder, drafter):
    settings = GenerationSettings(NEW, num_logprobs=3)
    with generate(decoder, PROMPT, settings, drafter=drafter) as generation:
        for token in generation:
            assert len(token.top) == 3
            assert token.logprob == token.top[0][1]
            yield float(token.id), token.logprob, token.top[2][1]


def test_a_draft_model_without_a_seed_keeps_the_distribution(zoo, tmp_path):
    """Three tokens, two choices each: the drafted second and third come with the model's probabilities."""
    folders = tmp_path / "large", tmp_path / "small"
    whole = zoo.save(zoo.config("llama", num_hidden_layers=4, vocab_size=8), folders[0]).model
    zoo.save(zoo.config("qwen2", num_hidden_layers=1, vocab_size=8), folders[1])
    decoder, drafter = make_decoder(folders[0]), ModelDrafter(folders[1])
    settings = GenerationSettings(3, temperature=3.0, top_k=3)
    counts: dict[tuple[int, ...], int] = {}
    drafted = accepted = 0
    for _ in range(200):
        with generate(decoder, [1, 2], settings, drafter=drafter) as generation:
            answer = tuple(token.id for token in generation)
        counts[answer] = counts.get(answer, 0) + 1
        drafted += generation.stats.drafted
        accepted += generation.stats.accepted
    assert 0 < accepted < drafted
    expected = _probabilities(whole, list(itertools.product(range(8), repeat=3)))
    assert not unlikely(counts, {answer: p for answer, p in expected.items() if p > 0}, at=1e-7)


@torch.no_grad()
def _probabilities(whole, answers):
    """Of each answer of three tokens to [1, 2], at temperature 3 from the three likeliest tokens."""
    chosen = torch.tensor(answers)
    logits = whole(torch.cat([torch.tensor([[1, 2]]).expand(len(answers), 2), chosen], dim=1)).logits[:, 1:-1] / 3.0
    logits = logits.masked_fill(logits < logits.topk(3).values[..., -1:], float("-inf"))
    found = logits.softmax(-1).gather(-1, chosen[..., None]).prod(dim=1)[:, 0]
    return dict(zip(answers, found.tolist(), strict=True))


def test_drafts_without_a_seed_were_drawn_from_the_probabilities_that_they_bring(small):
    drafting = ModelDrafter(small).begin(64, 97)
    sampler = Sampler(Sampling(1.3, top_k=6))
    counts: dict[int, int] = {}
    for _ in range(600):
        draft = drafting.draft(PROMPT, 1, sampler)
        counts[draft.tokens[0]] = counts.get(draft.tokens[0], 0) + 1
        (found_V,) = draft.probabilities
    assert found_V.shape == (97,)
    assert not unlikely(counts, {token: p for token, p in enumerate(found_V.tolist()) if p > 0}, at=1e-7)


def test_a_draft_model_that_cannot_draft_says_so(tmp_path, zoo, small):
    with pytest.raises(ConfigError, match="No draft model"):
        ModelDrafter(tmp_path)
    assert ModelDrafter(small).most == 8


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "cut weights": _cut,
    "no weights": lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 9),
    "other sizes": lambda folder: _configure(folder, vocab_size=53),
    "a size that is none": lambda folder: _configure(folder, hidden_size="wide"),
    "no heads": lambda folder: _configure(folder, num_attention_heads=0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_draft_model_that_is_damaged_says_so(tmp_path, small, damage):
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    DAMAGES[damage](folder)
    with pytest.raises(ConfigError, match="No draft model could be loaded"):
        ModelDrafter(folder)
