"""A Hugging Face checkpoint as an index of tensors: nothing is read before it is asked for.

    >>> checkpoint = open_checkpoint("path/to/llama")                        # doctest: +SKIP
    >>> dict(checkpoint.read(["model.norm.weight"]))                         # doctest: +SKIP

A local folder never touches the network; anything else is a hub id. Code of a checkpoint is never run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from fedsea.errors import ConfigError
from fedsea.model.architecture import describe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Config and tensor index of a model.

    Attributes:
        config: The model's configuration; not to be changed.
        folder: Folder of its files.
        files: Tensor name to the file in `folder` that holds it; a file may be absent while nothing of it is read.
    """

    config: PretrainedConfig
    folder: Path
    files: Mapping[str, str]

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the full model."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states at every cut."""
        return int(self.config.hidden_size)

    @property
    def tensor_names(self) -> Sequence[str]:
        """Every tensor of the checkpoint, sorted, as stored (a tied head is usually not)."""
        return sorted(self.files)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as stored, one at a time, file by file.

        Raises:
            ConfigError: A name is not in the index, or its file is missing or damaged.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if name not in self.files:
                raise ConfigError(f"{self.folder} has no tensor {name}; download or convert the checkpoint again.")
            by_file[self.files[name]].append(name)
        for file, wanted in by_file.items():
            path = self.folder / file
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in wanted:
                        yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None


def open_checkpoint(path_or_id: str, revision: str = "main") -> Checkpoint:
    """Open a checkpoint and check that fedsea can split it.

    Args:
        path_or_id: A local folder, or the id of a model on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; ignored for a folder.

    Raises:
        ConfigError: No such checkpoint, no config, no safetensors, a damaged file, or an architecture that cannot be
            split; the message gives the reason.
    """
    folder = _locate(path_or_id, revision)
    config = _read_config(folder)
    describe(config)
    return Checkpoint(config=config, folder=folder, files=_index(folder))


def _locate(path_or_id: str, revision: str) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{path_or_id} is a file; give the folder that holds config.json and the safetensors files.")
    if folder.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1:
        raise ConfigError(f"There is no folder {path_or_id}; give a checkpoint's folder, or an id of the hub.")
    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=list(_HUB_FILES)))
    except HFValidationError:
        raise ConfigError(f"{path_or_id!r} is neither a folder here nor an id of the hub.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"There is no folder {path_or_id} here, and the hub did not give a model of that name at revision "
            f"{revision!r} ({type(error).__name__}): check the name, the network, and `hf auth login` for gated models."
        ) from None


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json; a checkpoint is a folder as `save_pretrained` writes it.")
    if not isinstance(_read_json(path).get("model_type"), str):
        raise ConfigError(f"{path} names no model_type; the checkpoint needs the config that transformers writes.")
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"transformers cannot use {path} ({type(error).__name__}): the architecture is new to it or needs "
            "code of its own, which fedsea does not run, or a value is wrong. Update transformers or convert the model."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it is not a JSON object. Download the checkpoint again.")
    return values


def _index(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).is_file():
        files = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
            raise ConfigError(f"{folder / _INDEX} is damaged: its weight_map is not usable. Download it again.")
        shards = sorted(set(files.values()))
    elif (folder / _SINGLE).is_file():
        files, shards = {}, [_SINGLE]
    else:
        pickled = any(next(folder.glob(pattern), None) is not None for pattern in _PICKLED)
        raise ConfigError(
            f"{folder} has no {_SINGLE} or {_INDEX}"
            + (
                ", only pickled weights, which fedsea does not read: convert them with transformers' `save_pretrained`."
                if pickled
                else "; a checkpoint is a folder as `save_pretrained` writes it."
            )
        )
    for shard in shards:
        if (folder / shard).is_file():
            inside = _names(folder / shard)
            missing = sorted(name for name, file in files.items() if file == shard and name not in inside)
            if missing:
                raise ConfigError(f"{folder / shard} lacks {missing[0]}, which the index promises; download it again.")
            files = files or dict.fromkeys(inside, shard)
    return files


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ConfigError:
    if not path.is_file():
        return ConfigError(
            f"{path} is missing, but this segment needs tensors of it; complete the checkpoint's folder."
        )
    return ConfigError(f"{path} is truncated or damaged ({type(error).__name__}); download the checkpoint again.")
