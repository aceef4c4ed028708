"""Models whose frequencies depend on the length of the sequence decode with a cache as far as they stay the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea.errors import ConfigError
from fedsea.model.cache import Extension, most_tokens
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.trunk import CachedPart
from fedsea.types import Partition

CUT = Partition(1, 1)
ORIGINAL = 16
ROPES = {
    "longrope": (
        {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": ORIGINAL},
        4 * ORIGINAL,
    ),
    "dynamic": ({"factor": 4.0}, ORIGINAL),
}


@pytest.fixture(params=[("phi3", "longrope"), ("llama", "dynamic")], ids=lambda pair: pair[1])
def checkpoint(request, tmp_path):
    family, kind = request.param
    rope, context = ROPES[kind]
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **rope},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return open_checkpoint(str(tmp_path))


def test_longer_sequences_than_the_original_context_are_refused_at_both_sides(checkpoint):
    trunk = load_trunk(checkpoint, CUT.trunk(checkpoint.num_blocks), dtype=torch.float32)
    for segment in (
        load_input_blocks(checkpoint, CUT, dtype=torch.float32),
        trunk,
        load_output_blocks(checkpoint, CUT, dtype=torch.float32),
    ):
        with pytest.raises(ConfigError, match=f"at {ORIGINAL} tokens.*up to {ORIGINAL + 1} was asked for"):
            segment.open_cache(ORIGINAL + 1)
        assert segment.arena.pages == 0
        segment.open_cache(ORIGINAL).close()


def test_keys_that_are_kept_are_those_of_the_whole_sequence_up_to_there(checkpoint):
    trunk = load_trunk(checkpoint, CUT.trunk(checkpoint.num_blocks), dtype=torch.float32)
    hidden = torch.randn(ORIGINAL, trunk.hidden_size)
    cache, got = trunk.open_cache(ORIGINAL), []
    with torch.no_grad():
        expected = trunk(hidden, (ORIGINAL,))
        for piece in hidden.split((5, 1, ORIGINAL - 6)):
            extension = Extension((len(piece),), (cache,))
            got += trunk.extend_group([CachedPart(piece, extension, trunk.range)], trunk.freeze())
            extension.commit()
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-5)


def test_other_rotary_embeddings_set_no_bound():
    for family in ("llama", "gemma3_text", "gpt2"):
        assert most_tokens(AutoConfig.for_model(family)) is None
