"""Whether a model can be split: tried on a trunk of no blocks, so that it is split right or not at all."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedsea.model.packing import run
from fedsea.model.partition import BlockList, Layout, build, cut, refused
from fedsea.types import SegmentKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BLOCKS_READ = "the blocks"


class _Watched(BlockList):
    """An empty block list that notes when it is read."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__({})
        self._calls = calls

    def __iter__(self) -> Iterator[nn.Module]:
        self._calls.append(_BLOCKS_READ)
        return iter(())

    def __getitem__(self, index: Any) -> Any:
        self._calls.append(_BLOCKS_READ)
        return super().__getitem__(index)


def describe(config: PretrainedConfig) -> Layout:
    """How the model of a config would be cut; remembered for a few models.

    Raises:
        ConfigError: The architecture cannot be split; the message gives the reason.
    """
    return _described(_Asked(type(config), config.to_json_string(use_diff=False), config))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A config to be remembered by its content; some cannot be made again from their own text."""

    config_class: type
    text: str
    config: PretrainedConfig = field(compare=False, repr=False)


@functools.lru_cache(maxsize=4)
def _described(asked: _Asked) -> Layout:
    skeleton, layout = build(asked.config, torch.float32)
    cut(skeleton, layout, SegmentKind.TRUNK, range(0))
    _check_nothing_remains(skeleton, layout)
    return layout


def _check_nothing_remains(skeleton: PreTrainedModel, layout: Layout) -> None:
    """A trunk of no blocks must hand its input through: what acts before and after the blocks is really gone.

    The decoder must also call what is taken out where the layout says, or a client's segment would be wrong.
    """
    calls: list[str] = []
    decoder = skeleton.get_submodule(layout.decoder)
    decoder._modules[layout.blocks] = _Watched(calls)
    for name in (*layout.before, *layout.after):
        if (stand_in := decoder._modules[name]) is not None:
            stand_in.register_forward_pre_hook(lambda _module, _args, name=name: calls.append(name))
    hidden = torch.linspace(-1.0, 1.0, 3 * skeleton.config.hidden_size).view(3, -1)
    try:
        with torch.no_grad():
            out = run(decoder, hidden, [3], padded=False)
    except Exception as error:  # any failure of foreign code means the same
        raise refused(
            skeleton.config, f"its decoder does not run without its embedding ({type(error).__name__})"
        ) from error
    if not torch.equal(out, hidden):
        raise refused(skeleton.config, "its decoder changes hidden states before the first or after the last block")
    turn = calls.index(_BLOCKS_READ) if _BLOCKS_READ in calls else len(calls)
    misplaced = set(calls[:turn]) & set(layout.after) | set(calls[turn:]) & set(layout.before)
    if misplaced and _BLOCKS_READ in calls:
        raise refused(skeleton.config, f"its {min(misplaced)} acts on the other side of the blocks too")
