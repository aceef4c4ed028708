"""LLaMA-like blocks on new tokens, without what transformers' layers cost around the arithmetic.

For a few tokens at a time the layers' own code is half of the time: here the same products run as a short loop, with
the projections of queries, keys and values in one, and gate and up in one. LLaMA, Mistral, Qwen2 and Qwen3 blocks have
this form; everything else runs through its own layers (`model.packing.extend`), which give the same values.

    T  new tokens of all sequences, H  hidden size, Q  query heads, N  key/value heads, D  head size, I  inner size,
    R  sum of the ranks of a group of adapters, O  outputs of a group of projections
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from fedsea.model.cache import Extension
from fedsea.model.grouping import Way
from fedsea.model.lean_attention import attend
from fedsea.model.products import Copies, Product

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}
_TABLE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LowRank:
    """The adapters of one group of projections, as one product: x Aᵀ Bᵀ, scaled."""

    a_RH: torch.Tensor
    b_OR: torch.Tensor


BlockAdapters = tuple[LowRank | None, LowRank | None, LowRank | None, LowRank | None]
"""Of one block: queries/keys/values, attention output, gate/up, down."""


class _Group:
    """Projections of the same input, as one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        bases = [_base(layer) for layer in layers]
        self.weight_OH = bases[0].weight.data
        if len(bases) > 1:
            # The layers keep their parameters, which become views: nothing is held twice.
            self.weight_OH = torch.cat([base.weight.data for base in bases])
            parts = torch.split(self.weight_OH, [base.out_features for base in bases])
            for base, part in zip(bases, parts, strict=True):
                base.weight.data = part
        bias_O = None if bases[0].bias is None else bases[0].bias.data
        if bias_O is not None and len(bases) > 1:
            bias_O = torch.cat([base.bias.data for base in bases])
            for base, part_O in zip(bases, torch.split(bias_O, [len(base.bias) for base in bases]), strict=True):
                base.bias.data = part_O
        self.product = Product(self.weight_OH, bias_O, [base.weight for base in bases])
        self._places = [_place(layer) for layer in layers]

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, with the weights that they had."""
        return self._places == [_place(layer) for layer in layers]

    def adapters(self) -> LowRank | None:
        """The adapters as they are now."""
        found: list[Any] = [layer if _adapts(layer) else None for layer in self.layers]
        if not any(found):
            return None
        downs, ups = [], []
        for layer, plain in zip(found, self.layers, strict=True):
            if layer is None:
                ups.append(self.weight_OH.new_zeros(_base(plain).out_features, 0))
                continue
            name = layer.active_adapters[0]
            downs.append(layer.lora_A[name].weight.data)
            ups.append(layer.lora_B[name].weight.data * layer.scaling[name])
        dtype = self.weight_OH.dtype
        return LowRank(torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype))  # type: ignore[no-untyped-call]

    def __call__(self, x_TH: torch.Tensor, adapters: LowRank | None) -> torch.Tensor:
        out_TO = self.product(x_TH)
        if adapters is None:
            return out_TO
        return out_TO.addmm_(F.linear(x_TH, adapters.a_RH), adapters.b_OR.t())


def _base(layer: Any) -> nn.Linear:
    base: nn.Linear = layer.base_layer if isinstance(layer, LoraLinear) else layer
    return base


def _adapts(layer: Any) -> bool:
    """Whether a layer adds something to its base layer at the moment."""
    if not isinstance(layer, LoraLinear) or layer.disable_adapters or layer.merged:
        return False
    return layer.active_adapters[0] in layer.lora_A


def _place(layer: Any) -> tuple[int, int, int, tuple[str, ...]]:
    """What changes where a layer or its values are replaced, or adapters are merged into them."""
    base = _base(layer)
    bias = 0 if base.bias is None else base.bias.data_ptr()
    return id(layer), base.weight.data_ptr(), bias, tuple(getattr(layer, "merged_adapters", ()))


class _Norm:
    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight.data, module.variance_epsilon

    def is_of(self, module: Any) -> bool:
        return bool(self.weight.data_ptr() == module.weight.data_ptr())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Block:
    """One decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.groups = [_Group(projections) for projections in _projections(layer)]
        self.qkv, self.out, self.gate_up, self.down = self.groups
        self.activation = layer.mlp.act_fn
        self.head_size = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        self.num_queries = _base(attention.q_proj).out_features // self.head_size
        self.num_keys = _base(attention.k_proj).out_features // self.head_size
        self.query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.window = _window(attention)

    def is_of(self, layer: Any) -> bool:
        pairs = zip(self.groups, _projections(layer), strict=True)
        return self.norms[0].is_of(layer.input_layernorm) and all(group.is_of(found) for group, found in pairs)

    def prepare(self, rows: int) -> None:
        for group in self.groups:
            group.product.prepare(rows)

    def adapters(self) -> BlockAdapters:
        return self.qkv.adapters(), self.out.adapters(), self.gate_up.adapters(), self.down.adapters()

    def __call__(
        self, x_TH: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], way: Way, index: int, adapters: BlockAdapters
    ) -> torch.Tensor:
        rows, size = x_TH.shape[0], self.head_size
        qkv_TO = self.qkv(self.norms[0](x_TH), adapters[0])
        heads = qkv_TO.view(rows, -1, size)
        turned = heads[:, : self.num_queries + self.num_keys]
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = torch.split(turned, [self.num_queries, self.num_keys], dim=1)
            turned = torch.cat([self.query_norm(queries), self.key_norm(keys)], dim=1)
        cos_T1D, sin_T1D = turn
        # Rolled by half a head, the halves have changed places.
        turned = torch.addcmul(turned * cos_T1D, turned.roll(size // 2, -1), sin_T1D)
        queries_TQD, keys_TND = turned[:, : self.num_queries], turned[:, self.num_queries :]
        values_TND = heads[:, self.num_queries + self.num_keys :]
        mixed_TO = self._attend(queries_TQD, keys_TND, values_TND, way, index)
        x_TH = x_TH + self.out(mixed_TO, adapters[1])
        gate_TI, up_TI = self.gate_up(self.norms[1](x_TH), adapters[2]).chunk(2, dim=-1)
        return x_TH + self.down(self.activation(gate_TI) * up_TI, adapters[3])

    def _attend(
        self, queries_TQD: torch.Tensor, keys_TND: torch.Tensor, values_TND: torch.Tensor, way: Way, index: int
    ) -> torch.Tensor:
        mixed = []
        for group in way.groups:
            memories = group.write(index, keys_TND[group.rows], values_TND[group.rows])
            for run in group.runs:
                mixed.append(attend(queries_TQD[run.rows], *run.of(memories), run, self.scaling, self.window))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None


class LeanBlocks:
    """The blocks of one segment; made by `lean_blocks`.

    Args:
        layers: transformers' layers, whose weights are used as they are.
        rotary: The decoder's rotary embedding.
        norm: What follows the last block: the model's norm, or the identity.
    """

    def __init__(self, layers: Sequence[nn.Module], rotary: Any, norm: nn.Module) -> None:
        self._blocks = [_Block(layer) for layer in layers]
        self._rotary = rotary
        self._norm = None if isinstance(norm, nn.Identity) else _Norm(norm)
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        self._copies = Copies(group.product for block in self._blocks for group in block.groups)
        first = self._blocks[0]
        self._token_bytes = 2 * first.num_keys * first.head_size * first.qkv.weight_OH.element_size()

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, with the weights that they had; adapters may have been put on since."""
        if not all(_plain(layer) for layer in layers):
            return False
        return all(block.is_of(layer) for block, layer in zip(self._blocks, layers, strict=True))

    def adapters(self) -> list[BlockAdapters]:
        """The adapters as they are now, for `run`."""
        return [block.adapters() for block in self._blocks]

    def run(
        self, hidden_TH: torch.Tensor, extension: Extension, blocks: range, adapters: Sequence[BlockAdapters]
    ) -> torch.Tensor:
        """Hidden states [T, H] after some of the blocks; the caches take the new keys and values.

        Args:
            hidden_TH: Rows of all sequences, end to end.
            extension: Whose they are.
            blocks: Indices in the segment.
            adapters: As `adapters` gave them.
        """
        hidden_TH = hidden_TH.to(self._blocks[0].qkv.weight_OH.dtype)
        if self._copies.room():
            for index in blocks:
                self._blocks[index].prepare(hidden_TH.shape[0])
        way = Way(extension, hidden_TH.device, self._token_bytes)
        extension = way.extension
        if way.order_T is not None:
            hidden_TH = hidden_TH.index_select(0, way.order_T)
        turn = self._turn(hidden_TH, extension)
        for index in blocks:
            hidden_TH = self._blocks[index](hidden_TH, turn, way, index, adapters[index])
        if way.place_T is not None:
            hidden_TH = hidden_TH.index_select(0, way.place_T)
        return hidden_TH if self._norm is None else self._norm(hidden_TH)

    def _turn(self, hidden_TH: torch.Tensor, extension: Extension) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary factors of the new tokens; sines of the first half are negative, as halves are swapped unsigned."""
        longest = max(cache.length + new for new, cache in zip(extension.lengths, extension.caches, strict=True))
        if self._table is None or len(self._table[0]) < longest or self._table[0].dtype != hidden_TH.dtype:
            positions = torch.arange(-(-longest // _TABLE_TOKENS) * _TABLE_TOKENS, device=hidden_TH.device)
            cos, sin = self._rotary(hidden_TH[None], positions[None])
            half = sin.shape[-1] // 2
            sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._table = cos[0][:, None].contiguous(), sin[0][:, None].contiguous()
        cos_P1D, sin_P1D = self._table
        if len(extension.lengths) == 1:
            start = extension.caches[0].length
            stop = start + extension.lengths[0]
            return cos_P1D[start:stop], sin_P1D[start:stop]
        positions = extension.positions(hidden_TH.device)[0]
        return cos_P1D.index_select(0, positions), sin_P1D.index_select(0, positions)


def lean_blocks(decoder: nn.Module, layers: Sequence[nn.Module]) -> LeanBlocks | None:
    """A lean form of a decoder's layers, or None if they are not of a form that has one."""
    rotary = getattr(decoder, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if not layers or not isinstance(kind, str) or kind not in _STATIC_ROTARY:
        return None
    if not all(type(layer).__name__ in _LAYERS and _plain(layer) for layer in layers):
        return None
    return LeanBlocks(layers, rotary, decoder.get_submodule("norm"))


def _projections(layer: Any) -> tuple[tuple[nn.Module, ...], ...]:
    """Of one input each: queries/keys/values, attention output, gate/up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _plain(layer: Any) -> bool:
    for group in _projections(layer):
        for module in group:
            if type(_base(module)) is not nn.Linear:
                return False
            if isinstance(module, LoraLinear) and (len(module.active_adapters) != 1 or module.lora_variant):
                return False
        if len({_base(module).bias is None for module in group}) != 1:
            return False
        if len({_base(module).weight.dtype for module in group}) != 1:
            return False
    return True
