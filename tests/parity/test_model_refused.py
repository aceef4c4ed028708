"""Architectures that are refused, each with its reason: a model is split right or not at all."""

import pytest
from transformers import AutoConfig

from fedsea.errors import ConfigError
from fedsea.model.checkpoint import open_checkpoint

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

REFUSED = {
    "t5": ({"d_model": 32, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "bart": ({"d_model": 32, "is_encoder_decoder": True}, "encoder-decoder"),
    "bert": ({**SMALL, "is_decoder": True}, "not the one that embeds"),
    "vit": ({**SMALL}, "no causal language model"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "not attention"),
    "falcon_mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "not attention"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "not attention"),
    "recurrent_gemma": (SMALL, "not attention"),
    "jamba": ({**SMALL, "use_mamba_kernels": False}, "not attention"),
    "qwen3_next": (SMALL, "linear_attention"),
    "falcon_h1": (SMALL, "not attention"),
    "lfm2": ({**SMALL, "layer_types": ["conv", "full_attention"]}, "conv"),
    "deepseek_v32": (SMALL, "indexed_attention"),
    "gemma3": ({}, "multimodal"),
    "gemma3n_text": ({"num_kv_shared_layers": 1}, "share keys and values"),
    "gemma4_text": ({**SMALL, "num_kv_shared_layers": 0}, "without its embedding"),
    "nanochat": ({**SMALL, "intermediate_size": 64}, "other side of the blocks"),
    "ctrl": ({"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "changes hidden states"),
    "xglm": ({"vocab_size": 97, "d_model": 32, "num_layers": 2, "attention_heads": 4}, "changes hidden states"),
    "llama": (
        {**SMALL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "quantised",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_its_reason(model_type, tmp_path):
    settings, reason = REFUSED[model_type]
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot split models of type '{model_type}': .*{reason}"):
        open_checkpoint(str(tmp_path))
