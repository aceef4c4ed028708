"""Split training equals central training: loss and every gradient, for many families and partitions."""

import itertools

import pytest
import torch

from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.trunk import TrunkPart
from fedsea.types import BlockRange, Partition

F32 = torch.float32
HALF_SLIDING = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
CUTS = (*itertools.product((1, 2, 3), repeat=2), (0, 0))
ENDS = ((3, 3), (1, 2), (2, 1), (0, 0))
"""Every k and every m of `CUTS` once, and trunks from one block to all of them."""

# The families that the plan promises by name.
NAMED = {
    "llama_mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama_gqa": ("llama", {"tie_word_embeddings": False}),
    "llama_gqa_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_mha_tied_biases": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral_sliding": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"n_routed_experts": 4, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
# Families that work because the mechanism is generic.
OTHERS = {
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": HALF_SLIDING}),
    "gemma": ("gemma", {}),
    "gemma2_softcap": ("gemma2", {"sliding_window": 4, "layer_types": HALF_SLIDING}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 4, "layer_types": HALF_SLIDING}),
    "phi": ("phi", {}),
    "phi3_sliding": ("phi3", {"sliding_window": 4}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 4, "layer_types": HALF_SLIDING}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_projected": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2_sliding": ("starcoder2", {"sliding_window": 4}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 4, "layer_types": HALF_SLIDING}),
    "falcon_alibi": ("falcon", {"alibi": True, "head_dim": None}),
    "bloom": ("bloom", {}),
    "smollm3": ("smollm3", {}),
    "exaone4": ("exaone4", {"sliding_window": 4, "layer_types": HALF_SLIDING}),
    "nemotron": ("nemotron", {}),
    "helium": ("helium", {}),
    "llama4_chunked": (
        "llama4_text",
        {**MOE, "attention_chunk_size": 4, "intermediate_size_mlp": 48, "floor_scale": 4},
    ),
    "mixtral": ("mixtral", MOE),
    "glm4_moe": ("glm4_moe", {**MOE, **SHARED}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **SHARED, **LATENT}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "diffllama": ("diffllama", {}),
    "gpt_oss_sinks": ("gpt_oss", {**MOE, "sliding_window": 4, "layer_types": HALF_SLIDING}),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_family_equals_central_for_every_partition(name, zoo, tmp_path):
    central, batch = _central(zoo, NAMED[name], tmp_path)
    loss, gradients = central.loss_and_gradients([batch])
    checkpoint = open_checkpoint(str(tmp_path))
    inputs, outputs = _ends(checkpoint)
    for k, m in CUTS:
        trunk = load_trunk(checkpoint, Partition(k, m).trunk(checkpoint.num_blocks), dtype=F32)
        segments = (inputs[k], trunk, outputs[m])
        for segment in segments:
            segment.model.zero_grad()
        got = _split_loss(*segments, batch, None)
        got.backward()
        assert got.item() == pytest.approx(loss, rel=1e-5), f"k={k} m={m}"
        zoo.assert_close(central.collect(*segments), gradients, f"k={k} m={m}")


@pytest.mark.parametrize("name", OTHERS)
def test_other_family_equals_central_for_every_input_and_every_output_blocks(name, zoo, tmp_path):
    """One trunk serves all partitions, as at a server whose clients differ."""
    central, batch = _central(zoo, OTHERS[name], tmp_path)
    loss, gradients = central.loss_and_gradients([batch])
    checkpoint = open_checkpoint(str(tmp_path))
    num_blocks = checkpoint.num_blocks
    trunk = load_trunk(checkpoint, BlockRange(0, num_blocks), dtype=F32)
    inputs, outputs = _ends(checkpoint)
    for k, m in ENDS:
        for segment in (trunk, inputs[k], outputs[m]):
            segment.model.zero_grad()
        got = _split_loss(inputs[k], trunk, outputs[m], batch, BlockRange(k, num_blocks - m))
        got.backward()
        assert got.item() == pytest.approx(loss, rel=1e-5), f"k={k} m={m}"
        zoo.assert_close(central.collect(inputs[k], trunk, outputs[m]), gradients, f"k={k} m={m}")


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_sliding", "glm4", "gpt2", "bloom", "gemma2_softcap"])
def test_two_clients_with_different_cuts_in_one_group_equal_central_on_the_union(name, zoo, tmp_path):
    central, first = _central(zoo, {**NAMED, **OTHERS}[name], tmp_path)
    second = zoo.batch((4, 11), seed=1)
    loss, gradients = central.loss_and_gradients([first, second])
    checkpoint = open_checkpoint(str(tmp_path))
    cuts = (Partition(1, 3), Partition(2, 1))
    ranges = [cut.trunk(checkpoint.num_blocks) for cut in cuts]
    trunk = load_trunk(checkpoint, BlockRange(1, checkpoint.num_blocks - 1), dtype=F32)
    clients = [
        (load_input_blocks(checkpoint, c, dtype=F32), load_output_blocks(checkpoint, c, dtype=F32)) for c in cuts
    ]
    batches = (first, second)

    sent = [blocks(ids, lengths) for (blocks, _), (ids, _, lengths) in zip(clients, batches, strict=True)]
    entered = [hidden.detach().requires_grad_() for hidden in sent]
    parts = [TrunkPart(h, b[2], r) for h, b, r in zip(entered, batches, ranges, strict=True)]
    left = trunk.forward_group(parts)
    received = [hidden.detach().requires_grad_() for hidden in left]
    losses = [out.loss(h, b[2], b[1]) for (_, out), h, b in zip(clients, received, batches, strict=True)]
    for value in losses:
        value.backward()
    torch.autograd.backward(left, [hidden.grad for hidden in received])
    torch.autograd.backward(sent, [hidden.grad for hidden in entered])

    assert sum(value.item() for value in losses) == pytest.approx(loss, rel=1e-5)
    segments = [segment for client in clients for segment in client]
    zoo.assert_close(central.collect(trunk, *segments), gradients, "union")


def _central(zoo, family, folder):
    model_type, settings = family
    return zoo.save(zoo.config(model_type, **settings), folder), zoo.batch()


def _ends(checkpoint):
    """Input and output blocks of all of `CUTS`, by k and by m: a client's ends do not depend on each other."""
    inputs = {k: load_input_blocks(checkpoint, Partition(k, 0), dtype=F32) for k in (0, 1, 2, 3)}
    outputs = {m: load_output_blocks(checkpoint, Partition(0, m), dtype=F32) for m in (0, 1, 2, 3)}
    return inputs, outputs


def _split_loss(input_blocks, trunk, output_blocks, batch, blocks):
    ids, targets, lengths = batch
    return output_blocks.loss(trunk(input_blocks(ids, lengths), lengths, blocks), lengths, targets)
