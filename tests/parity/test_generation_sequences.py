"""What a generation takes and gives back: sequences used again, bad input, answers that nobody reads on."""

from __future__ import annotations

import gc

import pytest
import torch

from fedsea.client.drafters import EarlyExit, PromptLookup
from fedsea.client.generation import GenerationSettings, generate
from fedsea.errors import CapacityError, ConfigError, FedseaError, NonFiniteError
from tests.parity.test_decoding_parity import _decoder as make_decoder

NEW = 8
PROMPT = [5, 17, 33, 5, 17, 60, 21]


@pytest.fixture(scope="module")
def decoder(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    zoo.save(zoo.config("mistral", sliding_window=None), folder)
    return make_decoder(folder)


@pytest.fixture(autouse=True)
def nothing_left(decoder):
    """Every test gives all memory back."""
    yield
    gc.collect()
    assert _pages(decoder) == 0


def _pages(decoder):
    segments = (decoder.segments.input_blocks, decoder.segments.output_blocks, decoder.trunk._passes.trunk)
    return sum(segment.arena.pages for segment in segments)


def _ids(decoder, prompt, new=NEW, **options):
    with generate(decoder, prompt, GenerationSettings(new), **options) as generation:
        return [token.id for token in generation], generation.stats


@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_a_second_turn_computes_what_is_new_only(decoder, drafter):
    with decoder.open(64) as sequences:
        answer, first = _ids(decoder, PROMPT, drafter=drafter, sequences=sequences)
        turn = [*PROMPT, *answer, 70, 71]
        again, second = _ids(decoder, turn, drafter=drafter, sequences=sequences)
        assert first.cached_tokens == 0
        assert second.cached_tokens >= len(PROMPT) + NEW - 1
        assert sequences.tokens[0][: len(turn)] == turn
    assert again == _ids(decoder, turn)[0]


def test_another_prompt_goes_back_to_the_common_prefix(decoder):
    other = [*PROMPT[:4], 90, 91]
    with decoder.open(64) as sequences:
        _ids(decoder, PROMPT, sequences=sequences)
        found, stats = _ids(decoder, other, sequences=sequences)
        assert stats.cached_tokens == 4
        same, repeated = _ids(decoder, other, sequences=sequences)
        assert repeated.cached_tokens == len(other) - 1
    assert found == same == _ids(decoder, other)[0]


@pytest.mark.parametrize("drafter", [None, "early exit"])
@pytest.mark.parametrize("end", ["closed", "forgotten", "left", "ended", "never begun"])
def test_memory_comes_back_however_an_answer_ends(decoder, end, drafter):
    generation = generate(
        decoder, PROMPT, GenerationSettings(NEW), drafter=None if drafter is None else EarlyExit(decoder)
    )
    assert _pages(decoder) == 0
    if end != "never begun":
        next(generation)
        next(generation)
        assert _pages(decoder) > 0
    if end == "closed":
        generation.close()
        assert list(generation) == []
    elif end == "left":
        with generation:
            for _ in generation:
                break
    elif end == "ended":
        assert len(list(generation)) == NEW - 2
        assert generation.finish_reason == "length"
    del generation
    assert _pages(decoder) == 0  # at once, not when the collector comes by


def test_given_sequences_stay_open_when_an_answer_is_left(decoder):
    with decoder.open(64) as sequences:
        with generate(decoder, PROMPT, GenerationSettings(NEW), sequences=sequences) as generation:
            next(generation)
        assert _ids(decoder, PROMPT, sequences=sequences)[0] == _ids(decoder, PROMPT)[0]


def test_input_that_cannot_work_is_refused_before_anything_is_opened(decoder):
    settings = GenerationSettings(NEW)
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(decoder, [], settings)
    with pytest.raises(ConfigError, match="64 tokens here, and 60 and up to 8"):
        generate(decoder, [5] * 60, settings)
    with decoder.open(12) as one, decoder.open(64, 2) as two:
        with pytest.raises(ConfigError, match="12 tokens here, and 7 and up to 8"):
            generate(decoder, PROMPT, settings, sequences=one)
        with pytest.raises(ConfigError, match="sequences of one"):
            generate(decoder, PROMPT, settings, sequences=two)


def test_a_token_outside_the_vocabulary_is_refused(decoder):
    with pytest.raises(ConfigError, match="not below 97"):
        next(generate(decoder, [5, 97], GenerationSettings(NEW)))


def test_an_answer_fills_its_room_to_the_last_token(decoder):
    found, _ = _ids(decoder, PROMPT, new=64 - len(PROMPT), drafter=PromptLookup())
    assert len(found) == 64 - len(PROMPT)


def test_a_trunk_that_fails_ends_the_answer_with_its_error(decoder, monkeypatch):
    generation = generate(decoder, PROMPT, GenerationSettings(NEW))
    next(generation)
    monkeypatch.setattr(decoder.trunk._decoder, "run", lambda turns: [CapacityError("full")])
    with pytest.raises(FedseaError, match="full"):
        next(generation)
    assert generation.finish_reason is None


def test_logits_that_are_not_finite_end_the_answer(decoder, monkeypatch):
    generation = generate(decoder, PROMPT, GenerationSettings(NEW, temperature=1.0))
    next(generation)
    broken = decoder.segments.output_blocks
    monkeypatch.setattr(broken, "_few_logits", lambda hidden_TH: torch.full((hidden_TH.shape[0], 97), float("nan")))
    with pytest.raises(NonFiniteError):
        next(generation)
