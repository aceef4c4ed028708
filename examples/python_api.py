"""fedsea from Python, without a server: cut a model into its three segments, then train them together.

    python examples/python_api.py

Uses the small model and one of the invented silos that come with the package; takes about half a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import torch

from fedsea import (
    ClientOptions,
    Partition,
    load_input_blocks,
    load_output_blocks,
    load_trunk,
    open_checkpoint,
    train_alone,
)
from fedsea.client.trainer import EvaluationReport, StepReport
from fedsea.data import load_tokenizer
from fedsea.types import IGNORE

PLAN = """
[model]
path = {model}

[partition]
input_blocks = 1
output_blocks = 1

[optimizer]
learning_rate = 3e-3

[training]
rounds = 1
steps_per_round = {steps}

[data]
max_tokens = 256

[[clients]]
name = "clinic"
"""


def show_segments(model: Path) -> None:
    """Load a checkpoint as three segments, each with only its own weights, and pass two sequences through them."""
    checkpoint = open_checkpoint(str(model))
    partition = Partition(input_blocks=1, output_blocks=1)
    input_blocks = load_input_blocks(checkpoint, partition, dtype=torch.float32)
    trunk = load_trunk(checkpoint, partition.trunk(checkpoint.num_blocks), dtype=torch.float32)
    output_blocks = load_output_blocks(checkpoint, partition, dtype=torch.float32)
    for name, segment in (("input", input_blocks), ("trunk", trunk), ("output", output_blocks)):
        print(f"{name:7} blocks {list(segment.blocks)}, {segment.num_parameters:,} parameters")

    # A micro-batch is packed: T rows, the sequences end to end, without padding.
    tokenizer = load_tokenizer(str(model), "main", vocab_size=None)
    sequences = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("The patient slept well.", "No fever.")]
    lengths = tuple(len(ids) for ids in sequences)
    input_ids_T = torch.cat(sequences)
    targets_T = torch.cat([torch.cat([ids[1:], torch.tensor([IGNORE])]) for ids in sequences])
    with torch.no_grad():
        hidden_TH = input_blocks(input_ids_T, lengths)  # at the client; this is what would be sent
        hidden_TH = trunk(hidden_TH, lengths)  # at the server
        loss = output_blocks.loss(hidden_TH, lengths, targets_T)  # at the client, summed over target tokens
    print(f"hidden states {list(hidden_TH.shape)}, loss {loss / (targets_T != IGNORE).sum():.3f} nats a token\n")


class Printer:
    """An observer: told of every applied step and every evaluation."""

    def step(self, report: StepReport) -> None:
        """Show a step."""
        print(f"step {report.step + 1}/{report.num_steps}: loss {report.mean_loss:.3f}")

    def evaluation(self, report: EvaluationReport) -> None:
        """Show a validation loss."""
        print(f"held-out loss after {report.next_step} steps: {report.mean_loss:.3f}")


def train(model: Path, data: Path, steps: int) -> None:
    """Train all three segments in this process, as `fedsea train --alone` does; with a server, call `fedsea.train`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = folder / "plan.toml"
        plan.write_text(PLAN.format(model=f'"{model.resolve()}"', steps=steps))
        options = ClientOptions(server="", identity=Path(), data=(data,), run=folder / "run")
        summary = train_alone(plan, "clinic", options, Printer())
    print(f"trained on {summary.num_target_tokens:,} target tokens")


def main() -> None:
    """Show the segments, then train them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shipped one if not given")
    parser.add_argument("--data", type=Path, help="file of a silo; a shipped one if not given")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    with as_file(files("fedsea") / "assets") as assets:
        model = arguments.model or assets / "model"
        show_segments(model)
        train(model, arguments.data or assets / "silos" / "clinic.jsonl", arguments.steps)


if __name__ == "__main__":
    main()
