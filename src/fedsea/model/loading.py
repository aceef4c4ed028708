"""Loading a segment: only its tensors are read, straight into the place that the cut model has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fedsea.errors import ConfigError
from fedsea.model import adapters
from fedsea.model.architecture import describe
from fedsea.model.attention import checkpoint_activations
from fedsea.model.partition import Layout, build, cut
from fedsea.model.segment import Segment
from fedsea.model.segments import InputBlocks, OutputBlocks, Trunk
from fedsea.plan import FederationPlan, ModelSection
from fedsea.types import BlockRange, Partition, SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from fedsea.model.checkpoint import Checkpoint

_Segment = TypeVar("_Segment", bound=Segment)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_input_blocks(
    checkpoint: Checkpoint,
    partition: Partition,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> InputBlocks:
    """Embedding and the first blocks.

    Args:
        checkpoint: Where the weights are.
        partition: The cut; checked against the model.
        dtype: float32, bfloat16 or float16, of the weights and, without `autocast`, of the computation.
        device: Where the segment lives.
        activation_checkpointing: Recompute activations in the backward pass (in training mode).
        autocast: Compute in this type under `torch.autocast`.

    Raises:
        ConfigError: The partition leaves no trunk, or a tensor is missing or has the wrong shape.
    """
    partition.trunk(checkpoint.num_blocks)
    model, layout = _load(
        checkpoint, SegmentKind.INPUT, range(partition.input_blocks), dtype, device, activation_checkpointing
    )
    return _checked(InputBlocks(model, layout, range(partition.input_blocks), autocast))


def load_trunk(
    checkpoint: Checkpoint,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> Trunk:
    """Blocks `blocks`, without embedding, norm or head; arguments and errors as for `load_input_blocks`."""
    if blocks.stop > checkpoint.num_blocks:
        raise ConfigError(
            f"Blocks {blocks.start}:{blocks.stop} were asked of a model of {checkpoint.num_blocks} blocks."
        )
    indices = range(blocks.start, blocks.stop)
    model, layout = _load(checkpoint, SegmentKind.TRUNK, indices, dtype, device, activation_checkpointing)
    return _checked(Trunk(model, layout, indices, autocast))


def load_output_blocks(
    checkpoint: Checkpoint,
    partition: Partition,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> OutputBlocks:
    """The last blocks, final norm and head; arguments and errors as for `load_input_blocks`."""
    indices = range(partition.trunk(checkpoint.num_blocks).stop, checkpoint.num_blocks)
    model, layout = _load(checkpoint, SegmentKind.OUTPUT, indices, dtype, device, activation_checkpointing)
    return _checked(OutputBlocks(model, layout, indices, autocast))


def check_plan(plan: FederationPlan, config: PretrainedConfig) -> None:
    """Refuse a plan that does not fit its base model.

    Raises:
        ConfigError: Its adapters do not fit (see `adapters.check_plan`), or the model has no positions for its
            longest sequences.
    """
    adapters.check_plan(config, plan)
    reach = describe(config).reach
    if reach is not None and plan.data.max_tokens > reach.tokens:
        raise ConfigError(
            f"The plan's data.max_tokens is {plan.data.max_tokens}, but {reach.reason}: set data.max_tokens to at most "
            f"{reach.tokens}, or use a model that reaches further."
        )


def trainable_trunk(
    plan: FederationPlan, checkpoint: Checkpoint, blocks: BlockRange, device: torch.device | str = "cpu"
) -> Trunk:
    """A trunk as a plan wants it, its adapters attached; errors as for `load_trunk`."""
    trunk = load_trunk(checkpoint, blocks, device=device, **_settings(plan.model))
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    return trunk


def trainable_ends(
    plan: FederationPlan, checkpoint: Checkpoint, partition: Partition, device: torch.device | str = "cpu"
) -> tuple[InputBlocks, OutputBlocks]:
    """A client's two segments as a plan wants them, their adapters attached; errors as for `load_input_blocks`."""
    settings = _settings(plan.model)
    input_blocks = load_input_blocks(checkpoint, partition, device=device, **settings)
    output_blocks = load_output_blocks(checkpoint, partition, device=device, **settings)
    adapters.attach(input_blocks, plan.adapter, plan.adapter.input, plan.seed)
    adapters.attach(output_blocks, plan.adapter, plan.adapter.output, plan.seed)
    return input_blocks, output_blocks


def _settings(model: ModelSection) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, model.dtype),
        "activation_checkpointing": model.activation_checkpointing,
        "autocast": torch.bfloat16 if model.autocast == "bfloat16" else None,
    }


def _load(
    checkpoint: Checkpoint,
    kind: SegmentKind,
    blocks: range,
    dtype: torch.dtype,
    device: torch.device | str,
    activation_checkpointing: bool,
) -> tuple[PreTrainedModel, Layout]:
    if dtype not in _DTYPES:
        raise ConfigError(f"Weights of type {dtype} are not supported; choose float32, bfloat16 or float16.")
    model, layout = build(checkpoint.config, dtype)
    tied = dict(model.get_expanded_tied_weights_keys()) if checkpoint.config.tie_word_embeddings else {}
    cut(model, layout, kind, blocks)
    _fill(model, checkpoint, tied, torch.device(device))
    if activation_checkpointing and len(blocks):
        checkpoint_activations(model)
    return model, layout


def _checked(segment: _Segment) -> _Segment:
    segment.choose_packing()
    return segment


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, tied: Mapping[str, str], device: torch.device) -> None:
    wanted = dict(model.state_dict())
    stored = {name: _stored_name(name, model.base_model_prefix, tied, checkpoint.files) for name in wanted}
    parameters = dict(model.named_parameters())
    if any(stored[name] is None for name in parameters):
        _fill_converted(model, checkpoint, tied)
    else:
        names = {source: name for name, source in stored.items() if source is not None}
        for source, tensor in checkpoint.read(names):
            _place(model, names[source], tensor.to(device=device, dtype=wanted[names[source]].dtype))
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if missing:
        raise _missing(checkpoint, missing)
    model.to(device)


def _stored_name(name: str, prefix: str, tied: Mapping[str, str], stored: Mapping[str, str]) -> str | None:
    """Name under which a checkpoint holds a parameter; it may lack the base model's prefix, or hold only the twin."""
    for candidate in (name, tied.get(name)):
        for spelling in (candidate, candidate.removeprefix(f"{prefix}.")) if candidate is not None else ():
            if spelling in stored:
                return spelling
    return None


def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters.get(leaf)
    expected = owner._buffers[leaf] if held is None else held
    if expected is None or expected.shape != tensor.shape:
        raise ConfigError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, but the config asks for "
            f"{None if expected is None else tuple(expected.shape)}: config and weights are of different models."
        )
    if held is None:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


class _Lazy:
    """What transformers' converter takes for a tensor on disk: it reads when it is indexed."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        ((_, tensor),) = self._checkpoint.read([self._name])
        return tensor[index]


def _fill_converted(model: PreTrainedModel, checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Fill a model whose checkpoint is laid out otherwise (experts one by one, older names), by transformers' rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    lazy: dict[str, Any] = {name: _Lazy(checkpoint, name) for name in checkpoint.files}
    held = set(model.state_dict())
    for name, twin in tied.items():
        for source in (twin, twin.removeprefix(f"{model.base_model_prefix}.")):
            if name in held and name not in lazy and source in lazy:
                lazy[name] = _Lazy(checkpoint, source)
    settings = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model))
    info, _ = convert_and_load_state_dict_in_model(model, lazy, settings)
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=str)[0]
        raise ConfigError(
            f"{name} has shape {tuple(found)} in the checkpoint, but the config asks for {tuple(expected)}: "
            "config and weights are of different models."
        )
    if info.conversion_errors or info.error_msgs:
        raise ConfigError(f"transformers cannot convert the tensors of {checkpoint.folder}; save it again with it.")


def _missing(checkpoint: Checkpoint, names: list[str]) -> ConfigError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ConfigError(f"{checkpoint.folder} lacks the tensor {names[0]}{more}; download or convert the model again.")
