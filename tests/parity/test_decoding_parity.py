"""Greedy tokens of a split model with caches are those of the whole model's `generate`."""

from __future__ import annotations

import pytest
import torch

from fedsea.client import setup
from fedsea.client.decoding import SplitDecoder
from fedsea.client.local_trunk import LocalTrunk
from fedsea.errors import CapacityError, ConfigError
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.plan import parse_plan
from fedsea.privacy.boundary import Boundary
from tests.parity.test_model_parity import NAMED

LENGTHS = (5, 9, 3, 9, 1)
NEW = 10


def _decoder(folder, **sections):
    plan = parse_plan(
        {
            "model": {"path": str(folder)},
            "partition": {"input_blocks": 1, "output_blocks": 2},
            "clients": [{"name": "a"}],
            "inference": {"prefill_tokens": 4},
            **sections,
        }
    )
    checkpoint = open_checkpoint(str(folder))
    trunk = load_trunk(checkpoint, plan.partition_of("a").trunk(checkpoint.num_blocks), dtype=torch.float32)
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    segments = setup.load_segments(plan, checkpoint, "a", "cpu")
    return SplitDecoder(plan, segments, LocalTrunk(trunk, plan, "a"), Boundary("trusted-server"))


def _greedy(decoder, prompts, new=NEW):
    """All prompts as sequences of one session."""
    answers = [[] for _ in prompts]
    with decoder.open(max(map(len, prompts)) + new, len(prompts)) as sequences:
        logits = sequences.extend(prompts)
        for _ in range(new):
            tokens = logits.argmax(-1).tolist()
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
            logits = sequences.extend([[token] for token in tokens])
    return answers


@pytest.mark.parametrize("name", NAMED)
def test_greedy_tokens_of_unequal_sequences_are_the_whole_models(name, zoo, tmp_path):
    model_type, settings = NAMED[name]
    central = zoo.save(zoo.config(model_type, **settings), tmp_path)
    prompts = [part.tolist() for part in zoo.batch(LENGTHS)[0].split(LENGTHS)]
    whole = central.model
    expected = []
    for prompt in prompts:
        out = whole.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(prompt) :].tolist())
    decoder = _decoder(tmp_path)
    assert _greedy(decoder, prompts) == expected
    assert [_greedy(decoder, [prompt])[0] for prompt in prompts] == expected
    for segment in (decoder.segments.input_blocks, decoder.segments.output_blocks, decoder.trunk._passes.trunk):
        assert segment.arena.pages == 0


def test_a_model_without_a_longest_sequence_sets_no_bound(zoo, tmp_path):
    config = zoo.config("bloom")
    del config.max_position_embeddings
    zoo.save(config, tmp_path)
    decoder = _decoder(tmp_path)
    assert decoder.max_tokens == decoder.plan.inference.max_tokens
    with pytest.raises(ConfigError, match="'bloom' cannot decode with a cache here"):
        decoder.open(8)


def test_what_cannot_be_decoded_is_refused_and_says_why(zoo, tmp_path):
    zoo.save(zoo.config("llama"), tmp_path)
    decoder = _decoder(tmp_path)
    with pytest.raises(ConfigError, match="may have 64 tokens"):
        decoder.open(65)
    with pytest.raises(ConfigError, match="max_sequences is 64"):
        decoder.open(8, 65)
    with decoder.open(40) as sequences:
        with pytest.raises(ConfigError, match="at least one"):
            sequences.extend([[]])
        with pytest.raises(ConfigError, match="not below 97"):
            sequences.extend([[5, 97]])
        with pytest.raises(CapacityError, match="opened for 40"):
            sequences.extend([list(range(41))])
        assert sequences.extend([[5, 6]]).shape == (1, 97)
