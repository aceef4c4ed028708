"""What a client trained of a split model, on disk in the form in which transformers' `Trainer` looks for weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedsea.errors import ConfigError

_FILE = "model.safetensors"


def save_trained(model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the trained parameters, and nothing else.

    Args:
        model: The split model.
        folder: Made if need be.
        state: Take the values from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(model.state_dict() if state is None else state)
    save_file({name: values[name].detach().cpu().contiguous() for name in sorted(_trained(model))}, folder / _FILE)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Take over what `save_trained` wrote.

    Raises:
        ConfigError: The folder holds something else.
    """
    path = folder / _FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {_FILE}: give a folder of save_pretrained.")
    held, trained = load_file(path), _trained(model)
    if held.keys() != trained.keys() or any(held[name].shape != trained[name].shape for name in held):
        raise ConfigError(f"{path} was trained with another plan: its parameters are not those that train here.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(held[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
