"""What leaves a federation at its end: a PEFT adapter for the whole model, or the model with the adapter merged in.

Both are written to a folder that appears at once and whole, or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsea.errors import ConfigError
from fedsea.model.layout import block_of, is_target, is_tied, linears_of
from fedsea.model.partition import build
from fedsea.plan import AdapterSection, FederationPlan
from fedsea.storage import check_new_folder, storage_error, write_bytes_atomic, write_safetensors_atomic

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fedsea.model.fingerprint import Checkpoint

_PEFT_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_COMPANIONS = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
               "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken")  # fmt: skip
SHARD_BYTES = 2 << 30
"""Size of a merged checkpoint's files, and so about the memory that writing one takes."""


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: AdapterSection,
    config: PretrainedConfig,
    base_model: str,
    fedsea_info: Mapping[str, Any],
) -> None:
    """Write a standard PEFT checkpoint, which `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        folder: To be made; must not exist, or be empty.
        tensors: LoRA factors of all segments by portable name.
        settings: The plan's.
        config: Of the whole base model.
        base_model: Its path or hub id, for PEFT's `base_model_name_or_path`.
        fedsea_info: Anything that `json` can write; kept beside the adapter in `fedsea.json`.

    Raises:
        ConfigError: There is nothing to write, something was trained in full, or names and shapes are not the model's.
        StorageError: The disk refused; no folder is left.
    """
    from peft import LoraConfig

    whole = sorted(name for name in tensors if not name.endswith(_FACTORS))
    if whole:
        raise ConfigError(
            f"{whole[0]} was trained in full, which an adapter cannot hold; export the merged model instead."
        )
    if not tensors:
        raise ConfigError("No adapter was trained, so there is nothing to export.")
    modules = _modules(tensors, settings, config)
    alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=settings.rank,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        bias="none",
        fan_in_fan_out=any(linears_of(config)[name].transposed for name in modules),
        inference_mode=True,
        **_targets(modules, linears_of(config)),
    )
    if isinstance(lora.target_modules, set):
        lora.target_modules = sorted(lora.target_modules)  # so that the same adapter gives the same file
    with _appearing(folder) as temporary:
        lora.save_pretrained(str(temporary))
        values = {_PEFT_PREFIX + name: tensor.to("cpu", torch.float32) for name, tensor in sorted(tensors.items())}
        write_safetensors_atomic(temporary / "adapter_model.safetensors", values, {})
        _write_json(temporary / "fedsea.json", fedsea_info)


def write_merged(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, torch.Tensor],
    settings: AdapterSection,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base model with everything trained merged in, as `AutoModelForCausalLM.from_pretrained` loads it.

    Base tensors are streamed: about `shard_bytes` of memory, whatever the model's size. Where only one copy of a tied
    weight was trained, embedding and head are written apart.

    Args:
        folder: To be made; must not exist, or be empty.
        checkpoint: The whole base model.
        tensors: LoRA factors and fully trained parameters of all segments by portable name.
        settings: The plan's.
        dtype: Of the written floating-point tensors.
        shard_bytes: Largest file, unless one tensor alone is larger.

    Raises:
        ConfigError: A trained tensor has no place in the checkpoint, or a factor is missing.
        StorageError: The disk refused; no folder is left.
    """
    config = copy.deepcopy(checkpoint.config)
    names = _Names.of(config, checkpoint.tensor_names)
    lora = {name: tensor for name, tensor in tensors.items() if name.endswith(_FACTORS)}
    full = {name: tensor for name, tensor in tensors.items() if name not in lora}
    modules = _modules(lora, settings, config)
    stored = set(names.model_name.values())
    untied = {head for head, twin in names.tied.items() if is_tied(config) and not full.keys().isdisjoint((head, twin))}
    full = _as_stored(full, stored | untied, config)
    lost = sorted({f"{m}.weight" for m in modules} - stored | full.keys() - stored - untied)
    if lost:
        raise ConfigError(
            f"{checkpoint.folder} stores no {lost[0]}, so it cannot be merged file by file. Save the base model again "
            "with save_pretrained of transformers, or export the adapter and merge it with peft."
        )

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for source, tensor in checkpoint.read(checkpoint.tensor_names):
            name = names.model_name[source]
            base = tensor
            if name in full:
                tensor = full[name]
            elif name.removesuffix(".weight") in modules:
                tensor = _add(tensor, lora, name.removesuffix(".weight"), settings, config)
            yield name, tensor
            for head in untied:
                if names.tied[head] == name and head not in stored:
                    yield head, full.get(head, base)

    if untied:
        config.tie_word_embeddings = False
    config.dtype = dtype
    with _appearing(folder) as temporary:
        _write_shards(temporary, ((n, t.to(dtype) if t.is_floating_point() else t) for n, t in merged()), shard_bytes)
        config.save_pretrained(str(temporary))
        for pattern in _COMPANIONS:
            for path in checkpoint.folder.glob(pattern):
                shutil.copyfile(path, temporary / path.name)


@dataclass(frozen=True)
class _Names:
    """How a checkpoint spells the model's parameters.

    Attributes:
        model_name: Stored name to the model's; base models are often stored without the prefix of the whole.
        tied: Head to embedding weight, if the model can tie them.
    """

    model_name: Mapping[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PretrainedConfig, stored: Iterable[str]) -> _Names:
        model, _ = build(config, torch.float32)
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        prefix = f"{model.base_model_prefix}."
        names = {name: prefix + name if name not in known and prefix + name in known else name for name in stored}
        return cls(names, dict(model.get_expanded_tied_weights_keys()) if is_tied(config) else {})


def _as_stored(
    full: Mapping[str, torch.Tensor], stored: Collection[str], config: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """Fully trained parameters as the checkpoint has them: experts that are one tensor here may be many there."""
    from transformers.core_model_loading import revert_weight_conversion

    kept = {name: tensor for name, tensor in full.items() if name in stored}
    if len(kept) == len(full):
        return kept
    model, _ = build(config, torch.float32)
    others = {name: tensor for name, tensor in full.items() if name not in kept}
    return kept | {name: tensor.clone() for name, tensor in revert_weight_conversion(model, others).items()}


def _modules(tensors: Mapping[str, torch.Tensor], settings: AdapterSection, config: PretrainedConfig) -> frozenset[str]:
    """Modules that have LoRA factors, after a check of names and shapes against the model."""
    linears = linears_of(config)
    modules = frozenset(name.removesuffix(suffix) for name in tensors for suffix in _FACTORS if name.endswith(suffix))
    for module in sorted(modules):
        linear = linears.get(module)
        shapes = [tuple(tensors[module + factor].shape) for factor in _FACTORS if module + factor in tensors]
        if linear is None or shapes != [(settings.rank, linear.fan_in), (linear.fan_out, settings.rank)]:
            raise ConfigError(
                f"The LoRA factors of {module} do not fit the base model or the plan's adapter.rank; export with the "
                "plan and the base model that the run had."
            )
    return modules


def _targets(modules: frozenset[str], linears: Iterable[str]) -> dict[str, Any]:
    """The plainest `target_modules` that means exactly these modules and no others of the model."""
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    meant = {name for name in linears if any(is_target(name, leaf) for leaf in leaves)}
    if meant == modules:
        return {"target_modules": leaves}
    blocks = {block_of(module + ".") for module in modules}
    lists = {re.split(r"\.\d+\.", module, maxsplit=1)[0].rpartition(".")[2] for module in modules}
    if None not in blocks and len(lists) == 1 and {n for n in meant if block_of(n + ".") in blocks} == modules:
        return {"target_modules": leaves, "layers_to_transform": sorted(blocks), "layers_pattern": lists.pop()}
    return {"target_modules": "|".join(re.escape(module) for module in sorted(modules))}


def _add(
    weight: torch.Tensor,
    lora: Mapping[str, torch.Tensor],
    module: str,
    settings: AdapterSection,
    config: PretrainedConfig,
) -> torch.Tensor:
    a, b = (lora[module + factor].to(weight.device, torch.float32) for factor in _FACTORS)
    delta = (b @ a) * (settings.alpha / settings.rank)
    return weight.float() + (delta.t() if linears_of(config)[module].transposed else delta)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        write_safetensors_atomic(folder / f"{len(shards)}.safetensors", pending, {})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_bytes_atomic(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the body succeeds, and vanishes when it fails."""
    check_new_folder(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            # Files are written for their owner alone; an export is as readable as other new files here.
            path.chmod(stat.S_IMODE(temporary.stat().st_mode) & 0o666)
        temporary.rename(folder)
    except OSError as error:
        raise storage_error("write", folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(
    folder: Path, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], plan: FederationPlan, *, merged: bool
) -> None:
    """Write what a federation trained: `write_adapter`, or with `merged` `write_merged` in the plan's `model.dtype`.

    Raises:
        ConfigError: As either of them.
    """
    if merged:
        write_merged(folder, checkpoint, tensors, plan.adapter, getattr(torch, plan.model.dtype))
        return
    info = {"federation": plan.name, "plan_sha256": plan.sha256(), "fingerprint": plan.model.fingerprint}
    write_adapter(folder, tensors, plan.adapter, checkpoint.config, plan.model.path, info)
