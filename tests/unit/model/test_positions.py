"""Sequences are as long as a model's positions reach, and within that the same in any company."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsea.cli.federation_checks import _fits_model
from fedsea.client.decoding import SplitDecoder
from fedsea.client.setup import ClientOptions, open_base_model
from fedsea.errors import ConfigError
from fedsea.model.architecture import describe
from fedsea.model.cache import Extension
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import check_plan, load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.positions import reach_of
from fedsea.model.trunk import CachedPart
from fedsea.plan import parse_plan
from fedsea.server.run import resolve
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


SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4}
TABLES = {
    "gpt2": {**SMALL, "hidden_size": 32, "n_positions": ORIGINAL},
    "opt": {**SMALL, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": ORIGINAL},
    "gptj": {**SMALL, "hidden_size": 32, "rotary_dim": 4, "n_positions": ORIGINAL},
}
"""Tables of positions: learned, learned with rows that are left empty, and computed when the model is made."""


def plan_of(max_tokens: int, path: str = "m"):
    return parse_plan({"model": {"path": path}, "data": {"max_tokens": max_tokens}, "clients": [{"name": "a"}]})


def segments_of(checkpoint):
    return (
        load_input_blocks(checkpoint, CUT, dtype=torch.float32),
        load_trunk(checkpoint, CUT.trunk(checkpoint.num_blocks), dtype=torch.float32),
        load_output_blocks(checkpoint, CUT, dtype=torch.float32),
    )


def test_longer_sequences_are_refused_in_every_segment(checkpoint):
    for segment in segments_of(checkpoint):
        rows = torch.zeros(ORIGINAL + 3, segment.hidden_size)
        entering = rows[:, 0].long() if segment.kind == "input" else rows
        run = segment.loss if segment.kind == "output" else segment
        more = (entering[:, 0].long(),) if segment.kind == "output" else ()
        with pytest.raises(ConfigError, match=f"has {ORIGINAL + 1} tokens, but .*at most {ORIGINAL}"), torch.no_grad():
            run(entering, (2, ORIGINAL + 1), *more)
        with pytest.raises(ConfigError, match=f"up to {ORIGINAL + 1} tokens was asked for, but .*{ORIGINAL} together"):
            segment.open_cache(ORIGINAL + 1)
        assert segment.arena.pages == 0
        segment.open_cache(ORIGINAL).close()


def test_sequences_of_a_pack_do_not_change_each_other_up_to_there(checkpoint):
    trunk = segments_of(checkpoint)[1]
    frequencies = {name: buffer.clone() for name, buffer in trunk.model.named_buffers() if "inv_freq" in name}
    lengths = (10, ORIGINAL, 3)
    hidden = torch.randn(sum(lengths), trunk.hidden_size)
    with torch.no_grad():
        packed = trunk(hidden, lengths).split(lengths)
        for part, together in zip(hidden.split(lengths), packed, strict=True):
            torch.testing.assert_close(together, trunk(part, (len(part),)), rtol=1e-4, atol=1e-5)
    assert frequencies
    for name, buffer in trunk.model.named_buffers():
        assert name not in frequencies or torch.equal(buffer, frequencies[name])


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


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_used_to_its_end_and_no_further(family, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TABLES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    segment = load_input_blocks(open_checkpoint(str(tmp_path)), Partition(1, 0), dtype=torch.float32)
    assert segment.most_tokens == ORIGINAL
    ids = torch.zeros(ORIGINAL + 1, dtype=torch.long)
    with torch.no_grad():
        segment(ids[1:], (ORIGINAL,))
        with pytest.raises(ConfigError, match=f"a table of {ORIGINAL} positions: shorten"):
            segment(ids, (ORIGINAL + 1,))


def test_a_table_of_positions_in_an_encoder_of_images_is_none_of_the_text(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TABLES["gpt2"]))
    model.transformer.images = torch.nn.Module()
    model.transformer.images.position_embedding = torch.nn.Embedding(3, 8)
    model.transformer.h[0].attn.position_embedding = torch.nn.Embedding(ORIGINAL - 1, 8)
    assert reach_of(model, "transformer", "h").tokens == ORIGINAL - 1


def test_a_plan_of_longer_sequences_is_refused(checkpoint):
    check_plan(plan_of(ORIGINAL), checkpoint.config)
    with pytest.raises(ConfigError, match=f"data.max_tokens is 17, but .*set data.max_tokens to at most {ORIGINAL}"):
        check_plan(plan_of(ORIGINAL + 1), checkpoint.config)


@pytest.mark.parametrize(
    "begin",
    [
        resolve,
        lambda plan, _: open_base_model(plan, ClientOptions("", Path("identity")), "a"),
        lambda plan, checkpoint: _fits_model(checkpoint, plan),
    ],
    ids=["server", "client", "doctor"],
)
def test_everybody_refuses_it_before_anything_is_loaded(checkpoint, begin):
    begin(plan_of(ORIGINAL, str(checkpoint.folder)), checkpoint)
    with pytest.raises(ConfigError, match=r"data\.max_tokens is 17, but"):
        begin(plan_of(ORIGINAL + 1, str(checkpoint.folder)), checkpoint)


def test_decoding_offers_no_longer_sequences(checkpoint):
    first, trunk, last = segments_of(checkpoint)
    ends = SimpleNamespace(input_blocks=first, output_blocks=last)
    decoder = SplitDecoder(plan_of(ORIGINAL), ends, trunk, SimpleNamespace())
    with pytest.raises(ConfigError, match=f"may have {ORIGINAL} tokens"):
        decoder.open(ORIGINAL + 1)


def test_one_kind_of_layer_whose_frequencies_change_is_enough():
    kinds = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = AutoConfig.for_model(
        "gemma3_text",
        **SMALL,
        hidden_size=32,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=ORIGINAL,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=kinds,
    )
    assert describe(config).reach.tokens == ORIGINAL


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_frequencies_that_stay_set_no_bound(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(
        "llama", **SMALL, hidden_size=32, max_position_embeddings=4 * ORIGINAL,
        rope_parameters={**rope, "original_max_position_embeddings": ORIGINAL},
    )  # fmt: skip
    assert describe(config).reach is None
