"""One model's loss on several silos' held-out text, from trained parameters by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsea.client import setup
from fedsea.client.decoding import SplitDecoder
from fedsea.client.evaluation import evaluate
from fedsea.client.generation import GenerationSettings, generate
from fedsea.client.local_trunk import LocalTrunk
from fedsea.client.segments import ClientSegments
from fedsea.client.setup import ClientOptions
from fedsea.client.state import ClientStore
from fedsea.data.silo import Silo
from fedsea.data.tokenizer import load_tokenizer
from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_trunk
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.server.state import ServerStore
from fedsea.storage import CheckpointStore

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Losses:
    """Held-out losses in nats per target token.

    Attributes:
        pooled: Over all silos' held-out target tokens.
        by_silo: Silo to loss.
    """

    pooled: float
    by_silo: dict[str, float]


def trained_alone(run: Path) -> dict[str, torch.Tensor]:
    """The parameters in the run folder of a `fedsea train --alone` that has ended, by portable name."""
    found = ClientStore.peek(run) or {}
    trunk = CheckpointStore(run / "trunk", read_only=True).latest()
    tensors = {**found, **(trunk[1] if trunk else {})}
    prefix = "parameter."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def federated(server_run: Path, plan: FederationPlan) -> dict[str, torch.Tensor]:
    """The parameters of a federation's model, from its server's run folder."""
    return ServerStore.peek(server_run, plan)


class Comparison:
    """Evaluates sets of trained parameters on the held-out splits of a plan's clients, in this process.

    Args:
        plan: The federation's plan; its first client's partition is used.
        data: Client to its silo's file.
    """

    def __init__(self, plan: FederationPlan, data: Mapping[str, Path]) -> None:
        first = plan.clients[0]
        alone = plan.model_copy(update={"clients": (first,)})
        checkpoint = open_checkpoint(plan.model.path, plan.model.revision)
        self._plan = alone
        self._segments: ClientSegments = setup.load_segments(alone, checkpoint, first.name, "cpu")
        self._trunk = load_trunk(checkpoint, self._segments.trunk_blocks, dtype=getattr(torch, plan.model.dtype))
        adapters.attach(self._trunk, plan.adapter, plan.adapter.trunk, plan.seed)
        self._base = self._segments.parameters() | adapters.read(self._trunk)
        self._tokenizer = load_tokenizer(plan.model.path, plan.model.revision, vocab_size=None)
        self._data = dict(data)
        self.silos: dict[str, Silo] = {
            name: setup.open_data(plan, checkpoint, ClientOptions("", Path(), (file,))) for name, file in data.items()
        }

    def pool(self, path: Path) -> None:
        """Write the rows of all silos' training splits to a file, in their order."""
        with path.open("w", encoding="utf-8") as pooled:
            for name, silo in self.silos.items():
                lines = self._data[name].read_text(encoding="utf-8").splitlines()
                pooled.writelines(lines[row] + "\n" for row in silo.train().rows)

    def held_out_prompt(self, name: str) -> str:
        """The prompt of a silo's first held-out row."""
        row = int(self.silos[name].heldout().rows[0])
        line = self._data[name].read_text(encoding="utf-8").splitlines()[row]
        return str(json.loads(line)["prompt"])

    def losses(self, parameters: Tensors | None) -> Losses:
        """Losses of a model.

        Args:
            parameters: Trained parameters of all segments by portable name; None is the base model.
        """
        self._load(parameters)
        trunk = LocalTrunk(self._trunk, self._plan, self._segments.name)
        boundary = Boundary.of(self._plan)
        total, tokens, by_silo = 0.0, 0, {}
        for name, silo in self.silos.items():
            batches = setup.held_out(self._plan, silo, self._segments.name)
            loss, count = evaluate(self._segments, trunk, boundary, batches, self._plan)
            by_silo[name] = loss
            total += loss * count
            tokens += count
        return Losses(total / tokens, by_silo)

    def generate(self, parameters: Tensors | None, prompt: str, max_new_tokens: int) -> tuple[str, str]:
        """Greedy continuation of a prompt, and why it ended: "stop" or "length"."""
        self._load(parameters)
        trunk = LocalTrunk(self._trunk, self._plan, self._segments.name)
        ids = self._tokenizer(prompt)["input_ids"]
        end = self._tokenizer.eos_token_id
        if ids and ids[-1] == end:
            ids = ids[:-1]
        decoder = SplitDecoder(self._plan, self._segments, trunk, Boundary.of(self._plan))
        most = min(max_new_tokens, decoder.max_tokens - len(ids))
        settings = GenerationSettings(max_new_tokens=most, stop_tokens=() if end is None else (end,))
        with generate(decoder, ids, settings) as generation:
            new = [token.id for token in generation]
        return str(self._tokenizer.decode(new, skip_special_tokens=True)), generation.finish_reason or "length"

    def _load(self, parameters: Tensors | None) -> None:
        wanted = self._base if parameters is None else parameters
        self._segments.load_parameters(wanted)
        adapters.load(self._trunk, {name: wanted[name] for name in adapters.trainable(self._trunk)})
