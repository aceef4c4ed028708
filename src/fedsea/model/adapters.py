"""What is trained in a segment: LoRA on its linear layers, all of its parameters, or nothing.

Names are portable: a LoRA factor is called as in a PEFT checkpoint without its prefix,
`model.layers.7.self_attn.q_proj.lora_A.weight`, and a fully trained parameter as in the base model. No name says
which segment or client it came from, so adapters of any partition merge by a dict union.

Full training of a tied model: the input segment's embedding and the output segment's head are copies of one weight
at two places. Training both would let them drift apart, unlike central training, so it is refused; training one
leaves the other as it was, and a merged export writes them apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from fedsea.errors import ConfigError, FedseaError, ProtocolError
from fedsea.model.layout import (
    Linear,
    Shape,
    block_of,
    blocks_of,
    is_target,
    is_tied,
    linear_layers,
    linears_of,
    parameters_of,
    path_in_block,
    unit_of,
)
from fedsea.model.undrawn import Undrawn
from fedsea.plan import AdapterSection, FederationPlan, SegmentTraining
from fedsea.plan.trained import trains
from fedsea.types import Partition, SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ADAPTER = "default"
"""peft's name of the adapter; it appears in module names only, never in a portable name."""


class Segment(Protocol):
    """A part of a cut model; `model` has the full model's parameter names."""

    @property
    def kind(self) -> SegmentKind:
        """Which part it is."""

    @property
    def model(self) -> PreTrainedModel:
        """The cut `*ForCausalLM`."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order.

    >>> derive_seed(1, "a") == derive_seed(1, "a") != derive_seed("1a")
    True
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with torch's generators seeded, then put them back as they were; used for dropout."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if in_use else 0)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def attach(segment: Segment, settings: AdapterSection, training: SegmentTraining, seed: int) -> None:
    """Make a segment trainable as the plan says; to be called once, before the first forward.

    Whether the settings fit the whole model is for `check_settings` to say, which needs the uncut configuration.

    "adapter" puts LoRA on the target layers, with initial values that are a pure function of `seed` and each
    parameter's name; "full" turns the segment's weights into float32; "frozen" trains nothing. A segment without any
    target layer (no blocks) stays frozen.
    """
    model = segment.model
    model.requires_grad_(False)
    if training == "full":
        model.float().requires_grad_(True)
    elif training == "adapter":
        targets = _select(linear_layers(model), settings)
        if targets:
            _inject(model, targets, settings)
            _initialise(model, seed)
            model.train(model.training)  # peft's layers begin in training mode, whatever the model's


def trainable(segment: Segment) -> dict[str, nn.Parameter]:
    """The trained parameters by portable name, sorted by name."""
    found = {_portable(name): p for name, p in segment.model.named_parameters() if p.requires_grad}
    return dict(sorted(found.items()))


def read(segment: Segment) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters by portable name."""
    return {name: parameter.detach().clone() for name, parameter in trainable(segment).items()}


def load(segment: Segment, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the values of all trained parameters.

    Raises:
        ConfigError: Names or shapes are not this segment's, or a value is not finite; nothing was replaced.
    """
    parameters = trainable(segment)
    check_tensors(tensors, {name: tuple(p.shape) for name, p in parameters.items()}, ConfigError)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], error: type[FedseaError] = ProtocolError
) -> None:
    """Check trained parameters that came from elsewhere.

    Args:
        tensors: What came.
        shapes: What is expected, see `trainable_shapes`; every name must be there and no other.
        error: What to raise.

    Raises:
        FedseaError: Names the first tensor that is missing, unexpected, of another shape or type, or not finite.
    """
    advice = "both sides need the same plan, base model and version of fedsea"
    for name in sorted(shapes.keys() - tensors.keys()):
        raise error(f"The trained parameters lack {name}; {advice}.")
    for name in sorted(tensors.keys() - shapes.keys()):
        raise error(f"The trained parameters hold {name[:200]!r}, which is not trained here; {advice}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise error(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(shapes[name])}; {advice}.")
        if not tensor.is_floating_point():
            raise error(f"{name} has dtype {tensor.dtype} instead of a floating-point one; {advice}.")
        if not bool(torch.isfinite(tensor).all()):
            raise error(f"{name} holds values that are not finite; lower the learning rate, or leave that update out.")


def trainable_shapes(
    config: PretrainedConfig, partition: Partition, kinds: Iterable[SegmentKind], settings: AdapterSection
) -> dict[str, Shape]:
    """Names and shapes of what a process with these segments trains, without any of their weights.

    Args:
        config: Of the whole model.
        partition: Where it is cut.
        kinds: Segments that the process holds.
        settings: The plan's.

    Returns:
        Portable name to shape, sorted by name: the keys of `trainable` over those segments.

    Raises:
        ConfigError: The settings do not fit the model, see `check_settings`.
    """
    check_settings(config, settings)
    targets = _select(linears_of(config), settings)
    num_blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    shapes: dict[str, Shape] = {}
    for kind in kinds:
        blocks = blocks_of(kind, partition, num_blocks)
        training = getattr(settings, kind.value)
        if training == "full":
            shapes |= parameters_of(config, kind, blocks)
        elif training == "adapter":
            for name, linear in targets.items():
                if _belongs(name, kind, blocks):
                    shapes[f"{name}.lora_A.weight"] = (settings.rank, linear.fan_in)
                    shapes[f"{name}.lora_B.weight"] = (linear.fan_out, settings.rank)
    return dict(sorted(shapes.items()))


def check_settings(config: PretrainedConfig, settings: AdapterSection) -> None:
    """Check that the plan's adapter settings fit the whole model.

    Raises:
        ConfigError: A target names no linear layer of the model, or both copies of a tied weight would be trained.
    """
    _refuse_tied_twice(config, settings)
    if "adapter" not in (settings.input, settings.trunk, settings.output):
        return
    linears = linears_of(config)
    inside = sorted({path_in_block(name) for name in linears if block_of(name) is not None})
    if settings.targets == "all-linear":
        if not inside:
            raise ConfigError(
                f"The blocks of a {config.model_type!r} model hold no linear layer that LoRA can adapt; "
                'train the client\'s segments with adapter.input = "full" and adapter.output = "full" instead.'
            )
        return
    for target in settings.targets:
        found = [name for name in linears if is_target(name, target)]
        if not found:
            raise ConfigError(
                f"adapter.targets: {target!r} names no linear layer of this model that LoRA can adapt. Those of its "
                f'blocks are {", ".join(inside)}; "all-linear" takes them all.'
            )
        if is_tied(config) and any(unit_of(name + ".weight") == "head" for name in found):
            raise ConfigError(f"adapter.targets: {target!r} is tied to the embedding in this model; remove it.")


def check_plan(config: PretrainedConfig, plan: FederationPlan) -> None:
    """Check that a plan's adapter settings fit the whole model, and what the plan says of each segment is so.

    Raises:
        ConfigError: As `check_settings`; or a segment that counts as trained has no layer that the targets name.
    """
    settings = plan.adapter
    check_settings(config, settings)
    cuts: dict[Partition, str] = {}
    for name in plan.client_names:
        cuts.setdefault(plan.partition_of(name), name)
    for kind in SegmentKind:
        if getattr(settings, kind.value) != "adapter":
            continue
        missing = [
            name
            for cut, name in cuts.items()
            if trains(settings, kind, _held_blocks(cut, kind)) and not trainable_shapes(config, cut, [kind], settings)
        ]
        if not missing or (kind is SegmentKind.TRUNK and len(missing) < len(cuts)):
            continue
        where = "the trunk" if kind is SegmentKind.TRUNK else f"the {kind.value} segment of client {missing[0]}"
        raise ConfigError(
            f'adapter.{kind.value} = "adapter", but {where} has no linear layer that adapter.targets names: add a name '
            f'of one, or set adapter.{kind.value} = "frozen".'
        )


def _held_blocks(cut: Partition, kind: SegmentKind) -> int:
    """Blocks of a segment; for the trunk just that it has some."""
    return {SegmentKind.INPUT: cut.input_blocks, SegmentKind.OUTPUT: cut.output_blocks}.get(kind, 1)


def _select(linears: Mapping[str, Linear], settings: AdapterSection) -> dict[str, Linear]:
    targets = settings.targets
    if targets == "all-linear":
        return {name: linear for name, linear in linears.items() if block_of(name) is not None}
    return {name: linear for name, linear in linears.items() if any(is_target(name, target) for target in targets)}


def _belongs(name: str, kind: SegmentKind, blocks: range) -> bool:
    """Whether a linear layer is part of a segment."""
    block = block_of(name)
    return kind is SegmentKind.OUTPUT if block is None else block in blocks


def _refuse_tied_twice(config: PretrainedConfig, settings: AdapterSection) -> None:
    if is_tied(config) and settings.input == settings.output == "full":
        raise ConfigError(
            'adapter.input and adapter.output are both "full", but this model ties its embedding to its head: the two '
            'copies would drift apart. Set one of them to "adapter" or "frozen".'
        )


def _inject(model: PreTrainedModel, targets: Mapping[str, Linear], settings: AdapterSection) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from fedsea.model.lora import fuse

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(linear.transposed for linear in targets.values()),
        bias="none",
    )
    # On the meta device: the values are set by `_initialise`, without a draw from the global generator.
    with Undrawn():
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    fuse(model)


def _initialise(model: nn.Module, seed: int) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        device = module.get_base_layer().weight.device
        a, b = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
        generator = torch.Generator().manual_seed(derive_seed(seed, f"{name}.lora_A.weight"))
        values = torch.empty(a.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        a.weight = nn.Parameter(values.to(device))
        b.weight = nn.Parameter(torch.zeros(b.weight.shape, dtype=torch.float32, device=device))


def _portable(name: str) -> str:
    return name.replace(f".{_ADAPTER}.", ".")
