"""Families with an entry of their own, and the reasons for which a model cannot be split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM

from fedsea.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FAMILIES: dict[str, Family] = {
    "opt": Family(after=("final_layer_norm", "project_out")),
}
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "global", "local"})


def family_of(model_type: str) -> Family:
    """What is special about a family; the defaults for one without an entry."""
    return _FAMILIES.get(model_type, Family())


def refusal(config: PretrainedConfig) -> str | None:
    """Why a model cannot be split, as far as its config tells; None if nothing speaks against it."""
    if family_of(config.model_type).refused is not None:
        return family_of(config.model_type).refused
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; fedsea splits decoder-only language models"
    if config.get_text_config() is not config:
        return "it is multimodal; save its language model alone (its text config and `*ForCausalLM`) and split that"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; use the unquantised checkpoint"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "transformers has no causal language model of this type"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its blocks share keys and values with one another, so it cannot be cut between them"
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES)
    if getattr(model_class, "_is_stateful", False) or foreign:
        kinds = f" ({', '.join(map(str, foreign))})" if foreign else ""
        return f"it has recurrent or other blocks that are not attention{kinds}"
    return None
