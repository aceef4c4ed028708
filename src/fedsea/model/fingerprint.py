"""What identifies a base model: one SHA-256 per unit, so that each side checks just what it holds.

Units are "config", "tokenizer", "embedding", "block.0" … "block.N-1", "norm" and "head". A tensor belongs to a
unit by its name; the rules cover the decoders of transformers. A tied head that is not stored
has the hash of "embedding".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedsea.errors import ConfigError
from fedsea.model.layout import blocks_of, is_tied, unit_of
from fedsea.types import Partition, SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    | {"attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation"}
    | {"output_attentions", "output_hidden_states", "return_dict", "torchscript"}
    | {"id2label", "label2id", "problem_type", "task_specific_params"}
)
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""The whole tokenizer in each of the formats, best first; a worse one is read in the absence of the better."""


class Checkpoint(Protocol):
    """What a fingerprint needs of a checkpoint."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""

    @property
    def folder(self) -> Path:
        """Where its files are."""

    @property
    def tensor_names(self) -> Sequence[str]:
        """Every tensor of the checkpoint."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as stored, one at a time."""


def units_of(kind: SegmentKind, partition: Partition, num_blocks: int) -> tuple[str, ...]:
    """Units that a process with this segment has to check."""
    blocks = tuple(f"block.{block}" for block in blocks_of(kind, partition, num_blocks))
    if kind is SegmentKind.INPUT:
        return ("config", "tokenizer", "embedding", *blocks)
    if kind is SegmentKind.OUTPUT:
        return ("config", "tokenizer", *blocks, "norm", "head")
    return ("config", *blocks)


def fingerprint(checkpoint: Checkpoint, units: Iterable[str] | None = None) -> dict[str, str]:
    """Hash a checkpoint, one tensor in memory at a time.

    Args:
        checkpoint: Where names and tensors come from.
        units: Units to hash; all of them if `None`. A tokenizer that is not there is left out.

    Returns:
        Unit to SHA-256 in hex.

    Raises:
        ConfigError: A unit has no tensors in this checkpoint.
    """
    names = _names_by_unit(checkpoint)
    twin = {"head": "embedding"} if is_tied(checkpoint.config) and not names.get("head") else {}
    wanted = ["config", "tokenizer", *names] if units is None else list(dict.fromkeys(units))
    result: dict[str, str] = {}
    for unit in wanted:
        source = twin.get(unit, unit)
        if source == "config":
            result[unit] = _config_hash(checkpoint.config)
        elif source == "tokenizer":
            result.update(_tokenizer_hash(checkpoint.folder))
        elif source in result:
            result[unit] = result[source]
        elif source in names:
            result[unit] = _tensors_hash(checkpoint.read(names[source]))
        else:
            raise ConfigError(
                f"The checkpoint {checkpoint.folder} has no tensors of {unit!r}: it is incomplete, or another model."
            )
    return result


def check(expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Compare this machine's base model with the plan's.

    Args:
        expected: The plan's fingerprint; when empty, nothing was pinned and nothing is compared.
        actual: What `fingerprint` found here, for the units that this process holds.

    Raises:
        ConfigError: Names the units that differ.
    """
    if not expected:
        return
    differing = [
        unit
        for unit, found in actual.items()
        if found != expected.get(unit) and not (unit == "tokenizer" and unit not in expected)
    ]
    if differing:
        raise ConfigError(
            f"The base model here is not the plan's: {', '.join(differing)} differ. Use the same model and revision as "
            "the server (model.path and model.revision of the plan), or ask the operator whether the plan is right."
        )


def _names_by_unit(checkpoint: Checkpoint) -> dict[str, list[str]]:
    units: dict[str, list[str]] = {}
    for name in sorted(checkpoint.tensor_names):
        units.setdefault(unit_of(name), []).append(name)
    if is_tied(checkpoint.config):
        units.setdefault("head", [])  # usually not stored; a stored one is what gets loaded, and may differ
    return {unit: units[unit] for unit in sorted(units, key=_unit_order)}


def _unit_order(unit: str) -> tuple[int, int]:
    block = unit.removeprefix("block.")
    return (1, int(block)) if block.isdigit() else (["embedding", "", "norm", "head"].index(unit), 0)


def _config_hash(config: PretrainedConfig) -> str:
    # Only values that differ from the class's defaults: a newer transformers writes more defaults than an older one.
    def architecture(values: Any) -> Any:
        if isinstance(values, dict):
            return {str(key): architecture(value) for key, value in values.items() if key not in _NOT_ARCHITECTURE}
        return [architecture(value) for value in values] if isinstance(values, (list, tuple)) else values

    text = json.dumps(architecture(config.to_diff_dict()), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_hash(folder: Path) -> dict[str, str]:
    for names in _TOKENIZER_FILES:
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
            return {
                "tokenizer": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
            }
    return {}


def _tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    lines = []
    for name, tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
