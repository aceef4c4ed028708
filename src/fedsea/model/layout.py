"""Names of a whole model's parameters: which part of a decoder each belongs to, and their shapes without weights.

Nothing here is per family: a block is what has an index in its name, the rest is told apart by the words that the
decoders of transformers use for embedding, final norm and head.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from fedsea.model.partition import build, cut
from fedsea.plan.trained import HEADS, HEADS_ONLY
from fedsea.types import Partition, SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Shape: TypeAlias = tuple[int, ...]

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output)\.")
_EMBEDDING = re.compile(r"emb|wte|wpe|project_in")


def block_of(name: str) -> int | None:
    """Index of the block that a parameter or module belongs to.

    >>> block_of("model.layers.7.mlp.experts.3.up_proj.weight")
    7
    >>> block_of("lm_head.weight") is None
    True
    """
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def unit_of(name: str) -> str:
    """Unit that a tensor belongs to; what is neither block, head nor embedding counts as "norm".

    >>> [unit_of(name) for name in ("transformer.wpe.weight", "h.2.ln_1.bias", "model.norm.weight", "embed_out.weight")]
    ['embedding', 'block.2', 'norm', 'head']
    """
    block = block_of(name)
    if block is not None:
        return f"block.{block}"
    if _HEAD.search(name):
        return "head"
    return "embedding" if _EMBEDDING.search(name) else "norm"


def blocks_of(kind: SegmentKind, partition: Partition, num_blocks: int) -> range:
    """Blocks that a segment holds."""
    trunk = partition.trunk(num_blocks)
    return {
        SegmentKind.INPUT: range(0, trunk.start),
        SegmentKind.TRUNK: range(trunk.start, trunk.stop),
        SegmentKind.OUTPUT: range(trunk.stop, num_blocks),
    }[kind]


def path_in_block(name: str) -> str:
    """A name without what leads to its block: `self_attn.q_proj` for `model.layers.7.self_attn.q_proj`."""
    return re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]


def is_target(name: str, target: str) -> bool:
    """Whether one of peft's `target_modules` means the module `name`.

    >>> is_target("model.layers.7.self_attn.q_proj", "q_proj"), is_target("model.layers.7.mlp.up_proj", "proj")
    (True, False)
    """
    return name == target or name.endswith("." + target)


def is_tied(config: PretrainedConfig) -> bool:
    """Whether the LM head is the embedding's own weight."""
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer; `transposed` ones (Conv1D of GPT-2) keep their weight as (fan_in, fan_out)."""

    fan_in: int
    fan_out: int
    transposed: bool


@functools.lru_cache(maxsize=4)
def _linears(config_class: Any, text: str) -> dict[str, Linear]:
    return linear_layers(build(config_class.from_dict(json.loads(text)), torch.float32)[0])


@functools.lru_cache(maxsize=64)
def _parameters(config_class: Any, text: str, kind: SegmentKind, blocks: range) -> dict[str, Shape]:
    model, layout = build(config_class.from_dict(json.loads(text)), torch.float32)
    cut(model, layout, kind, blocks)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def linears_of(config: PretrainedConfig) -> Mapping[str, Linear]:
    """Linear layers of the whole model that `config` describes, without any weights; remembered for a few models."""
    config_class: Any = type(config)
    return _linears(config_class, config.to_json_string(use_diff=False))


def parameters_of(config: PretrainedConfig, kind: SegmentKind, blocks: range) -> Mapping[str, Shape]:
    """Names and shapes of a segment's parameters, without any weights; remembered for a few segments."""
    config_class: Any = type(config)
    return _parameters(config_class, config.to_json_string(use_diff=False), kind, blocks)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every layer of a model that LoRA may sit on: the linear layers of its blocks, and its head.

    A router that is a linear layer by descent gives scores and choices, and is none; nor is a layer that peft takes for
    another one.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        if not _is_counted(name):
            continue
        if isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router"):
            found[name] = Linear(module.in_features, module.out_features, transposed=False)
        elif isinstance(module, Conv1D):
            found[name] = Linear(module.nx, module.nf, transposed=True)
    taken = _taken_for_experts(model, {name.rpartition(".")[2] for name in found})
    return {name: linear for name, linear in found.items() if name.rpartition(".")[2] not in taken}


def _is_counted(name: str) -> bool:
    """Whether a layer is where a plan counts on it: it tells heads from blocks by the last word of a target."""
    leaf = name.rpartition(".")[2]
    return leaf in HEADS if block_of(name + ".") is None else leaf not in HEADS_ONLY


def _taken_for_experts(model: nn.Module, leaves: Iterable[str]) -> frozenset[str]:
    """Names that peft takes for those of experts, which were linear layers once and are one tensor now.

    In some families a dense or shared layer is called the same. peft would put an adapter on all experts instead, here
    and wherever an exported adapter is loaded.
    """
    # By the config alone: a segment may hold none of the blocks with experts, and its names have to be the whole's.
    if not any("experts" in key for key in vars(model.config)):
        return frozenset()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_taken(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # half of what is one tensor now
            return True
        return leaf not in (config.target_modules or ())

    return frozenset(leaf for leaf in leaves if is_taken(leaf))
