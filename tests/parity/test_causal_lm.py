"""`SplitCausalLM.generate` gives the tokens that the whole model's `generate` gives."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from fedsea.client.causal_lm import SplitCausalLM
from tests.parity.test_decoding_parity import _decoder
from tests.parity.test_model_parity import NAMED

FAMILIES = ("llama_gqa_tied", "qwen2", "mistral_sliding", "glm4")
LENGTHS = (5, 9, 3, 9, 1)
NEW = 10
WAYS = {
    "greedy": {"do_sample": False},
    "greedy-without-cache": {"do_sample": False, "use_cache": False},
    "repetition": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
}


def _pair(zoo, folder, name="llama_gqa_tied"):
    model_type, settings = NAMED[name]
    central = zoo.save(zoo.config(model_type, **settings), folder).model
    return central, SplitCausalLM(_decoder(folder))


def _padded(prompts):
    """Left padding, as generation wants it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def _prompts(zoo):
    return [part.tolist() for part in zoo.batch(LENGTHS)[0].split(LENGTHS)]


def _both(central, split, inputs, **settings):
    found = []
    for model in (central, split):
        torch.manual_seed(3)
        found.append(model.generate(**inputs, max_new_tokens=NEW, pad_token_id=0, **settings).tolist())
    return found


def _pages(split):
    decoder = split.decoder
    segments = decoder.segments
    return [part.arena.pages for part in (segments.input_blocks, segments.output_blocks, decoder.trunk._passes.trunk)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_whole_models(name, way, zoo, tmp_path):
    central, split = _pair(zoo, tmp_path, name)
    prompts = _prompts(zoo)
    for inputs in (_padded(prompts[:1]), _padded(prompts)):
        expected, got = _both(central, split, inputs, **WAYS[way])
        assert got == expected
    assert _pages(split) == [0, 0, 0]
