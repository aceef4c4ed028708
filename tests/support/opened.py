"""A split model without a server: both sides in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedsea.client import setup
from fedsea.client.decoding import SplitDecoder
from fedsea.client.inference import OpenedDecoder
from fedsea.client.local_trunk import LocalTrunk
from fedsea.data.tokenizer import load_tokenizer
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.plan import parse_plan
from fedsea.privacy.boundary import Boundary


def open_local(folder: Path, chat_template: str | None = None, **sections: Any) -> OpenedDecoder:
    """The model of a checkpoint, split for its one client."""
    plan = parse_plan({"model": {"path": str(folder)}, "clients": [{"name": "a"}], **sections})
    checkpoint = open_checkpoint(str(folder))
    trunk = load_trunk(checkpoint, plan.partition_of("a").trunk(checkpoint.num_blocks), dtype=torch.float32)
    adapters.attach(trunk, plan.adapter, plan.adapter.trunk, plan.seed)
    segments = setup.load_segments(plan, checkpoint, "a", "cpu")
    local = LocalTrunk(trunk, plan, "a")
    tokenizer = load_tokenizer(str(folder), vocab_size=None)
    tokenizer.chat_template = chat_template
    decoder = SplitDecoder(plan, segments, local, Boundary.of(plan))
    return OpenedDecoder(decoder, tokenizer, plan, "a", local, checkpoint)


def pages(opened: OpenedDecoder) -> list[int]:
    """Pages of keys and values that are in use: in both segments, and in the trunk."""
    segments, trunk = opened.decoder.segments, opened.trunk
    assert isinstance(trunk, LocalTrunk)
    models: list[Any] = [segments.input_blocks, segments.output_blocks, trunk._passes.trunk]
    return [model.arena.pages for model in models]
