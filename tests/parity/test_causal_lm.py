"""`SplitCausalLM.generate` gives the tokens that the whole model's `generate` gives."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from fedsea.client.causal_lm import SplitCausalLM
from fedsea.errors import ConfigError, ProtocolError
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
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
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


@pytest.fixture(scope="module")
def pair_of(zoo, tmp_path_factory):
    """The two models of a family, made once for all ways to generate, which leave them as they were."""
    return functools.cache(lambda name: _pair(zoo, tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_whole_models(name, way, zoo, pair_of):
    central, split = pair_of(name)
    prompts = _prompts(zoo)
    for inputs in (_padded(prompts[:1]), _padded(prompts)):
        expected, got = _both(central, split, inputs, **WAYS[way])
        assert got == expected
    assert _pages(split) == [0, 0, 0]


def test_assistant_and_prompt_lookup_change_nothing(zoo, tmp_path):
    central, split = _pair(zoo, tmp_path)
    prompt = _padded([_prompts(zoo)[1] * 2])
    expected = central.generate(**prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": central}):
        assert split.generate(**prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **way).tolist() == expected
    assert _pages(split) == [0, 0, 0]


def test_streamer_and_stop_strings_work_as_they_do_on_the_whole_model(zoo, tmp_path):
    central, split = _pair(zoo, tmp_path)
    letters = Tokenizer(models.BPE({chr(32 + token): token for token in range(97)}, []))
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    prompt = _padded(_prompts(zoo)[:1])
    whole = central.generate(**prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist()
    stop = {"stop_strings": [chr(32 + whole[7]) + chr(32 + whole[8])], "tokenizer": tokenizer}

    class Streamed(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamed = Streamed()
    expected, got = _both(central, split, prompt, do_sample=False, **stop)
    assert got == expected
    assert len(got[0]) < len(whole)
    assert _both(central, split, prompt, do_sample=False, streamer=streamed)[1] == [whole]
    assert streamed.tokens == 2 * whole
    assert streamed.ended


def test_scores_are_the_whole_models(zoo, tmp_path):
    central, split = _pair(zoo, tmp_path)
    prompts = _padded(_prompts(zoo))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    expected, got = (model.generate(**prompts, pad_token_id=0, **settings) for model in (central, split))
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cache_is_kept_from_turn_to_turn(zoo, tmp_path):
    """A conversation goes on from what was computed; the answer is that of the whole text."""
    central, split = _pair(zoo, tmp_path)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first, more = _prompts(zoo)[:2]
    with split.new_cache(48) as cache:
        answer = split.generate(torch.tensor([first]), cache=cache, **settings)
        held = cache.get_seq_length()
        text = torch.cat([answer, torch.tensor([more])], dim=1)
        mask = torch.ones_like(text)  # a token of the answer may be the one that pads
        got = split.generate(text, attention_mask=mask, cache=cache, **settings)
        assert held == len(first) + 3
        assert got.tolist() == central.generate(text, attention_mask=mask, **settings).tolist()
        assert cache.get_seq_length() == got.shape[1] - 1
    assert _pages(split) == [0, 0, 0]


def test_logits_with_and_without_a_cache_are_the_whole_models(zoo, tmp_path):
    central, split = _pair(zoo, tmp_path)
    inputs = _padded(_prompts(zoo))
    with torch.no_grad():
        expected = central(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(split(**inputs).logits[mask], expected[mask], rtol=1e-4, atol=1e-5)
        last = split(**inputs, logits_to_keep=2).logits
        torch.testing.assert_close(last[mask[:, -2:]], expected[:, -2:][mask[:, -2:]], rtol=1e-4, atol=1e-5)
        chosen = split(**inputs, logits_to_keep=torch.tensor([8, 6])).logits
        torch.testing.assert_close(chosen[0], expected[0, [8, 6]], rtol=1e-4, atol=1e-5)
        out = split(**inputs, use_cache=True)
        torch.testing.assert_close(out.logits[mask], expected[mask], rtol=1e-4, atol=1e-5)
        out.cache.close()
        with split.new_cache() as cache:
            out = split(**inputs, past_key_values=cache)  # the older name
            assert out.cache is cache
            torch.testing.assert_close(out.logits[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert _pages(split) == [0, 0, 0]


def test_long_sequences_are_evaluated_although_no_training_batch_could_hold_them(zoo, tmp_path):
    central = zoo.save(zoo.config("llama"), tmp_path).model
    split = SplitCausalLM(_decoder(tmp_path, data={"max_tokens": 16}))
    ids = zoo.batch((40,))[0][None]
    with torch.no_grad():
        torch.testing.assert_close(split(ids).logits, central(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"data\.max_tokens"):
        split(ids, labels=ids)


def test_guidance_by_a_negative_prompt_is_the_whole_models(zoo, tmp_path):
    """That prompt has a cache that `generate` does not know of, also where the call's own is kept."""
    central, split = _pair(zoo, tmp_path)
    prompts = _prompts(zoo)
    settings = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([prompts[1]]), "do_sample": False}
    for way in ({}, {"use_cache": False}):
        expected, got = _both(central, split, _padded(prompts[:1]), **settings, **way)
        assert got == expected
        assert _pages(split) == [0, 0, 0]
    with split.new_cache(48) as cache:
        kept = split.generate(**_padded(prompts[:1]), cache=cache, max_new_tokens=NEW, pad_token_id=0, **settings)
        assert kept.tolist() == expected
        assert _pages(split) == [2, 2, 2]
    assert _pages(split) == [0, 0, 0]


def test_caches_that_nobody_closes_are_closed_with_the_next_one_or_with_the_model(zoo, tmp_path):
    _, split = _pair(zoo, tmp_path)
    ids = torch.tensor([_prompts(zoo)[0]])
    forgotten = split(ids, use_cache=True)
    held = _pages(split)
    assert held[0] > 0
    del forgotten
    gc.collect()
    kept = split(ids, use_cache=True).cache
    assert _pages(split) == held
    split.close()
    assert _pages(split) == [0, 0, 0]
    with pytest.raises(ProtocolError, match="closed"):
        kept.extend(ids, None, 0)


def test_what_cannot_be_done_is_refused_and_says_why(zoo, tmp_path):
    central, split = _pair(zoo, tmp_path)
    ids = torch.tensor([_prompts(zoo)[0]])
    settings = {"max_new_tokens": 2, "pad_token_id": 0}
    with pytest.raises(ConfigError, match="may have 64 tokens"):
        split.generate(ids, max_new_tokens=90, pad_token_id=0)
    with pytest.raises(ConfigError, match="not below 97"):
        split.generate(ids + 97, **settings)
    with pytest.raises(ConfigError, match="at least one"):
        split.generate(ids.repeat(2, 1), attention_mask=torch.tensor([[1] * 5, [0] * 5]), **settings)
    padded = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    for way in ({}, {"use_cache": False}):
        with pytest.raises(ConfigError, match="pad on the left"):
            split.generate(**padded, **settings, **way)
    with pytest.raises(ConfigError, match="assistant_early_exit needs all blocks"):
        split.generate(ids, assistant_early_exit=2, **settings)
    with pytest.raises(ConfigError, match="new_cache"):
        split.generate(ids, cache=DynamicCache(), **settings)
    with pytest.raises(ConfigError, match="cache_implementation"):
        split.generate(ids, cache_implementation="static", **settings)
    with pytest.raises(ConfigError, match="assistant"):
        central.generate(ids, assistant_model=split, **settings)
    with pytest.raises(ConfigError, match="at the server"):
        split(ids, output_hidden_states=True)
    with pytest.raises(ConfigError, match="needs input_ids"):
        split(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ConfigError, match="count 0, 1, 2"):
        split(ids, position_ids=torch.tensor([[3, 4, 5, 6, 7]]))
    with pytest.raises(ConfigError, match="stays where it is"):
        split.to(torch.float16)
    assert _pages(split) == [0, 0, 0]
