"""Where a decoder is cut, and how: one generic mechanism over transformers' own `*ForCausalLM`.

A segment is the model itself with parts taken out, built without weights: its block list keeps the original
indices as names and its decoder keeps its own `forward`, so masks, rotary tables and layer types come along.
Every rule here was found by looking at what transformers' decoders share; `families` holds the exceptions.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from fedsea.errors import ConfigError
from fedsea.model import temperature
from fedsea.model.attention import attention_for
from fedsea.model.families import family_of, refusal
from fedsea.model.positions import Reach, reach_of
from fedsea.model.undrawn import Undrawn
from fedsea.types import SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BUILDING = threading.Lock()
"""accelerate changes how torch makes parameters, in all threads, while a model is built."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a `*ForCausalLM`.

    Attributes:
        decoder: Path of the module that runs the blocks, e.g. "model", "transformer", "model.decoder".
        blocks: Name of the block list in it.
        before: Children of the decoder that act before the first block; only the input segment has them.
        after: Children that act after the last block; only the output segment has them.
        attention: Attention implementation that works on packed sequences, or None if the family has no such way.
        reach: How long sequences may be, or None if the model sets no bound.
    """

    decoder: str
    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    attention: str | None
    reach: Reach | None


class BlockList(nn.ModuleList):
    """Blocks under their original indices, read from 0 by the decoder's own loop.

    >>> blocks = BlockList({2: nn.Identity(), 3: nn.Linear(1, 1)})
    >>> sorted(blocks.state_dict()), blocks[0], len(blocks[:5])
    (['3.bias', '3.weight'], Identity(), 2)
    """

    def __init__(self, blocks: dict[int, nn.Module]) -> None:
        super().__init__()
        for index, block in blocks.items():
            self.add_module(str(index), block)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._modules.values())[index]

    def stage(self, start: int, stop: int) -> BlockList:
        """The blocks `start … stop - 1` (original indices): the same modules, not copies."""
        return BlockList({index: self.get_submodule(str(index)) for index in range(start, stop)})


class Zero(nn.Module):
    """Stands where position embeddings are added, in a segment that gets them in its hidden states already."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero that broadcasts, whatever the arguments."""
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        return torch.zeros((), device=device, dtype=torch.float16)


def build(config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, Layout]:
    """The whole model without weights: parameters on the meta device, buffers real (rotary tables are not stored).

    Raises:
        ConfigError: The architecture cannot be split; the message gives the reason.
    """
    if reason := refusal(config):
        raise refused(config, reason)
    config = copy.deepcopy(config)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    attention = attention_for(model_class)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    settings = {} if attention is None else {"attn_implementation": attention}
    try:
        with _BUILDING, init_empty_weights(include_buffers=False), Undrawn():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise refused(config, f"transformers cannot build it from its config ({type(error).__name__})") from error
    if attention is not None:
        temperature.take_over(model)
    return model.eval(), _find(model, attention)


def _find(model: PreTrainedModel, attention: str | None) -> Layout:
    config, family = model.config, family_of(model.config.model_type)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and "." in name
    ]
    if not lists or model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise refused(config, "no list of its num_hidden_layers blocks between an embedding and a head was found")
    path, _, blocks = min(lists, key=lambda name: name.count(".")).rpartition(".")
    if model.get_input_embeddings() not in model.get_submodule(path).children():
        raise refused(config, "the module that runs its blocks is not the one that embeds, as in BERT-like encoders")
    before, after, passed = [], [], False
    for name, child in model.get_submodule(path).named_children():
        if name == blocks:
            passed = True
        elif not child.state_dict() and not _acts_on_hidden_states(child):
            continue  # rotary tables and the like stay in every segment
        elif isinstance(child, nn.Dropout):
            before.append(name)  # of the embedding, though some declare it last
        elif name in family.after or (name not in family.before and (passed or "final" in name)):
            after.append(name)
        else:
            before.append(name)
    return Layout(path, blocks, tuple(before), tuple(after), attention, reach_of(model, path, blocks))


def _acts_on_hidden_states(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) or "Norm" in type(module).__name__


def cut(model: PreTrainedModel, layout: Layout, kind: SegmentKind, blocks: Iterable[int]) -> None:
    """Take everything out of a whole model that a segment does not have, in place.

    Args:
        model: As `build` makes it.
        layout: Its layout.
        kind: The segment; the input segment has what comes before the blocks, the output segment what comes after.
        blocks: Original indices of the blocks that stay, consecutive; may be empty.
    """
    decoder, kept = model.get_submodule(layout.decoder), list(blocks)
    whole: nn.ModuleList = getattr(decoder, layout.blocks)
    decoder._modules[layout.blocks] = BlockList({index: whole[index] for index in kept})
    start, stop = (kept[0], kept[-1] + 1) if kept else (0, 0)
    for module in decoder.get_submodule(layout.blocks).modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            # Slots of a cache are counted from 0 in every segment.
            module.layer_idx -= start
    _cut_configs(model, start, stop)
    cut_per_layer_lists(decoder, len(whole), start, stop)
    if kind != SegmentKind.INPUT:
        embedding = decoder.get_input_embeddings()
        for name in layout.before:
            decoder._modules[name] = _neutral(decoder._modules[name], embedding)
        for name in family_of(model.config.model_type).multipliers:
            if hasattr(decoder, name):
                setattr(decoder, name, 1.0)
    if kind != SegmentKind.OUTPUT:
        for name in layout.after:
            decoder._modules[name] = nn.Identity()
        _remove_outside(model, layout)


def _neutral(module: nn.Module | None, embedding: nn.Module) -> nn.Module | None:
    if module is embedding:
        return None
    return Zero() if isinstance(module, nn.Embedding) else nn.Identity()


def _remove_outside(model: PreTrainedModel, layout: Layout) -> None:
    path = layout.decoder.split(".")
    owner: nn.Module = model
    for step in path:
        for name, child in owner.named_children():
            if name != step and child.state_dict():
                owner._modules[name] = None
        owner = owner.get_submodule(step)


def _cut_configs(model: PreTrainedModel, start: int, stop: int) -> None:
    whole = model.config
    config = cut_config(whole, start, stop)
    for module in model.modules():
        if getattr(module, "config", None) is whole:
            module.config = config


def cut_config(config: PretrainedConfig, start: int, stop: int) -> PretrainedConfig:
    """A copy of a config for the blocks `start … stop - 1`, counted in that config."""
    num_blocks = config.num_hidden_layers
    config = copy.deepcopy(config)
    cut_per_layer_lists(config, num_blocks, start, stop)
    config.num_hidden_layers = stop - start
    # Input and output segment each hold a copy of a tied weight; nothing in one segment may tie again.
    config.tie_word_embeddings = False
    return config


def cut_per_layer_lists(owner: Any, num_blocks: int, start: int, stop: int) -> None:
    """Cut every list with one value a block, such as `layer_types`."""
    for name, value in vars(owner).items():
        if isinstance(value, (list, tuple)) and len(value) == num_blocks and "layer" in name:
            setattr(owner, name, value[start:stop])


def refused(config: PretrainedConfig, reason: str) -> ConfigError:
    """The error for an architecture that cannot be split."""
    return ConfigError(f"fedsea cannot split models of type {config.model_type!r}: {reason}.")
