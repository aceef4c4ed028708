"""Attention for packed sequences: every sequence by itself, without a mask over the whole pack.

Registered with transformers under two names. Both call the family's ordinary attention once for each group of
sequences of equal length, as a [B, heads, L, D] batch, with the corner of the mask that a sequence of that
length would have had alone. So whatever the family's mask says (sliding windows, chunks) holds in the pack.

    B  sequences of one length, L  their length, T  tokens of the pack, N  heads, D  head size
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsea.errors import ConfigError
from fedsea.model import temperature
from fedsea.model.branching import BRANCHING
from fedsea.model.cache import EXTENDING, Extension
from fedsea.model.rowwise import are_rows_apart, attend_own

SDPA = "fedsea_segments"
EAGER = "fedsea_segments_eager"

_Attention: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class OwnMaskError(Exception):
    """A block does not use the mask that it was given, so it has to run padded."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Sequences of a pack, longest first.

    Attributes:
        groups: (length, how many sequences of that length follow one another).
    """

    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Segments:
        """Group sorted lengths.

        >>> Segments.of((5, 3, 3, 1)).groups
        ((5, 1), (3, 2), (1, 1))
        """
        return cls(tuple((length, lengths.count(length)) for length in sorted(set(lengths), reverse=True)))

    @property
    def longest(self) -> int:
        """L of the first sequence: positions 0 … L-1 of the pack are its own."""
        return self.groups[0][0]


_CURRENT: ContextVar[Segments | None] = ContextVar("fedsea_segments", default=None)


@contextlib.contextmanager
def attend_within(segments: Segments | None) -> Iterator[None]:
    """Attention in this context sees the pack's sequences apart; None is ordinary attention."""
    token = _CURRENT.set(segments)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def attention_for(model_class: type[PreTrainedModel]) -> str | None:
    """The attention implementation under which a model runs packed, or None if it has to be padded."""
    if not (model_class._supports_attention_backend and model_class._can_set_attn_implementation()):
        return None
    return SDPA if model_class._supports_sdpa else EAGER


def _by_segment(
    inner: _Attention,
    module: nn.Module,
    query_1NTD: torch.Tensor,
    key_1NTD: torch.Tensor,
    value_1NTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if are_rows_apart():
        inner = attend_own
    branches = BRANCHING.get()
    if branches is not None:
        return branches.attend(module, query_1NTD, key_1NTD, value_1NTD, **kwargs), None
    if (scale := temperature.of(module)) is not None:
        inner = scale.before(inner)
    extension = EXTENDING.get()
    if extension is not None:
        return _by_sequence(inner, extension, module, query_1NTD, key_1NTD, value_1NTD, attention_mask, **kwargs)
    segments = _CURRENT.get()
    if segments is None:
        return inner(module, query_1NTD, key_1NTD, value_1NTD, attention_mask, **kwargs)
    longest = segments.longest
    if attention_mask is not None and tuple(attention_mask.shape[-2:]) != (longest, longest):
        raise OwnMaskError(f"{type(module).__name__} makes an attention mask of its own.")
    sizes = [length * count for length, count in segments.groups]
    # One split, not a slice a group: the backward of a slice fills a tensor of the whole pack.
    parts = zip(*(torch.split(tensor[0], sizes, dim=1) for tensor in (query_1NTD, key_1NTD, value_1NTD)), strict=True)
    out_1TND = []
    for (length, count), part in zip(segments.groups, parts, strict=True):
        query, key, value = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in part)
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        out_BLND, _ = inner(module, query, key, value, mask, **kwargs)
        out_1TND.append(out_BLND.reshape(1, count * length, *out_BLND.shape[2:]))
    return torch.cat(out_1TND, dim=1), None


def _by_sequence(
    inner: _Attention,
    extension: Extension,
    module: nn.Module,
    query_1NTD: torch.Tensor,
    key_1NTD: torch.Tensor,
    value_1NTD: torch.Tensor,
    mask_S1TC: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """New tokens of several sequences, each with its own past."""
    block: int = module.layer_idx  # type: ignore[assignment]
    lengths = list(extension.lengths)
    if mask_S1TC is not None and mask_S1TC.shape[0] != len(lengths):
        raise OwnMaskError(f"{type(module).__name__} makes an attention mask of its own.")
    parts = zip(*(torch.split(tensor[0], lengths, dim=1) for tensor in (query_1NTD, key_1NTD, value_1NTD)), strict=True)
    out_1TND = []
    for number, (cache, (query, key, value)) in enumerate(zip(extension.caches, parts, strict=True)):
        keys, values = cache.write(block, key, value)
        mask = None if mask_S1TC is None else mask_S1TC[number : number + 1, :, : query.shape[1], : keys.shape[1]]
        out_1TND.append(inner(module, query[None], keys[None], values[None], mask, **kwargs)[0])
    return (out_1TND[0] if len(out_1TND) == 1 else torch.cat(out_1TND, dim=1)), None


def _sdpa_by_segment(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _by_segment(sdpa_attention_forward, module, *args, **kwargs)


def _eager_by_segment(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    # The family's own: it knows about soft-capping, sinks and whatever else keeps it from sdpa.
    inner: _Attention = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return _by_segment(inner, module, *args, **kwargs)


def _corner(
    make: Callable[..., torch.Tensor | None],
    *,
    q_length: int,
    kv_length: int,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask of the longest sequence, which comes first: every other one's is the corner of it."""
    if BRANCHING.get() is not None:
        return None
    extension = EXTENDING.get()
    if extension is not None:
        kwargs.pop("q_offset", None), kwargs.pop("kv_offset", None), kwargs.pop("attention_mask", None)
        return _masks_of(extension, make, allow_is_causal_skip, use_vmap=use_vmap, **kwargs)
    segments = _CURRENT.get()
    if segments is not None:
        # transformers sees positions that start again, and asks for a mask over the pack; apart, none is needed.
        q_length = kv_length = segments.longest
        allow_is_causal_skip = not use_vmap
    return make(
        q_length=q_length,
        kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


def _masks_of(
    extension: Extension, make: Callable[..., torch.Tensor | None], may_skip: bool, **kwargs: Any
) -> torch.Tensor | None:
    """A mask [T, C] for each sequence, in the corners of one tensor [S, 1, T, C]; None if none is needed."""
    pairs = [(new, cache.length) for new, cache in zip(extension.lengths, extension.caches, strict=True)]

    def one(new: int, past: int, skip: bool) -> torch.Tensor | None:
        kwargs["batch_size"] = 1
        sizes = {"q_length": new, "kv_length": past + new, "q_offset": past, "kv_offset": 0}
        return make(**sizes, attention_mask=None, allow_is_causal_skip=skip, **kwargs)

    if may_skip and all(one(new, past, True) is None for new, past in pairs):
        return None
    masks = [one(new, past, False) for new, past in pairs]
    if any(mask is None for mask in masks):
        return None
    width, height = max(new + past for new, past in pairs), max(extension.lengths)
    first = masks[0]
    assert first is not None
    together = first.new_zeros(len(masks), 1, height, width)
    for row, mask in zip(together, masks, strict=True):
        assert mask is not None
        row[:, : mask.shape[2], : mask.shape[3]] = mask[0]
    return together


def _sdpa_corner(**kwargs: Any) -> torch.Tensor | None:
    return _corner(sdpa_mask, **kwargs)


def _eager_corner(**kwargs: Any) -> torch.Tensor | None:
    return _corner(eager_mask, **kwargs)


AttentionInterface.register(SDPA, _sdpa_by_segment)
AttentionInterface.register(EAGER, _eager_by_segment)
AttentionMaskInterface.register(SDPA, _sdpa_corner)
AttentionMaskInterface.register(EAGER, _eager_corner)


def _recompute(function: Callable[..., Any], *args: Any, offload: bool, settings: Mapping[str, Any]) -> Any:
    # The backward pass recomputes in a thread of autograd's own, where the caller's context is not set.
    segments = _CURRENT.get()

    def again(*inputs: Any) -> Any:
        with attend_within(segments):
            return function(*inputs)

    kept = save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else contextlib.nullcontext()
    with kept:
        return checkpoint(again, *args, **{"use_reentrant": False, **settings})


def checkpoint_activations(
    model: nn.Module, every_n_layers: int = 1, *, offload: bool = False, settings: Mapping[str, Any] | None = None
) -> None:
    """Recompute the activations of blocks in the backward pass, when the model is in training mode.

    Args:
        model: Whose blocks.
        every_n_layers: Only of the first of so many blocks; 1: of all.
        offload: Keep the blocks' inputs, from which they are recomputed, in the host's memory.
        settings: More of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ConfigError: The family's blocks cannot do so, or it is asked for in a way that they cannot.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError("Blocks of this family cannot recompute activations; set activation_checkpointing = false.")
    if every_n_layers < 1:
        raise ConfigError("Activations of every_n_layers blocks are recomputed: give 1 or more.")
    if (settings := settings or {}).get("use_reentrant"):
        raise ConfigError("Blocks recompute their activations without reentrance: leave use_reentrant out.")
    function = partial(_recompute, offload=offload, settings=settings)
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index % every_n_layers == 0
        block._gradient_checkpointing_func = function
