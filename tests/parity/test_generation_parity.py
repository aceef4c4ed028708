"""What a split model generates is what the whole model's `generate` does: greedy and with a seed."""

from __future__ import annotations

import pytest
import torch

from fedsea.client.generation import GenerationSettings, generate
from tests.parity.test_decoding_parity import _decoder as make_decoder

NEW = 16
PROMPT = [5, 17, 33, 5, 17, 60, 21]
SAMPLED = {
    "temperature": {"temperature": 0.7},
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "all": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}
OFF = {"top_k": 0, "top_p": 1.0, "min_p": None, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A whole model, and the same one split."""
    folder = tmp_path_factory.mktemp("model")
    return zoo.save(zoo.config("llama"), folder).model, make_decoder(folder)


def _whole(model, seed=None, **settings):
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **settings)
    return out[0, len(PROMPT) :].tolist()


def _split(decoder, **settings):
    with generate(decoder, PROMPT, GenerationSettings(max_new_tokens=NEW, **settings)) as generation:
        return [token.id for token in generation]


def test_greedy_tokens_are_the_whole_models(model):
    whole, decoder = model
    assert _split(decoder) == _whole(whole, do_sample=False)
    assert _split(decoder, repetition_penalty=1.4) == _whole(whole, do_sample=False, repetition_penalty=1.4)


@pytest.mark.parametrize("name", SAMPLED)
def test_seeded_tokens_are_the_whole_models(model, name):
    whole, decoder = model
    for seed in (0, 7, 2**63):
        expected = _whole(whole, seed, do_sample=True, **OFF | SAMPLED[name])
        assert _split(decoder, seed=seed, **SAMPLED[name]) == expected


def test_a_seed_leaves_the_global_generator_alone(model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _split(model[1], temperature=1.0, seed=5)
    _split(model[1], temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_before_a_stop_token_and_holds_no_memory(model):
    whole, decoder = model
    expected = _whole(whole, do_sample=False)
    with generate(decoder, PROMPT, GenerationSettings(NEW, stop_tokens=(expected[5],))) as generation:
        assert [token.id for token in generation] == expected[: expected.index(expected[5])]
        assert generation.finish_reason == "stop"
    assert decoder.segments.input_blocks.arena.pages == 0
