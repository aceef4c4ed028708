"""How much memory do a client's segments need, and the server's trunk, against the whole model?

Each part runs in a fresh process: import everything, load the part, run 64 tokens through it, read the resident
memory. `imports` is what a process has before it loads anything, and is taken off the others.

    python benchmarks/client_memory.py --shape 100m
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import arguments, finish
from _inputs import SHAPES, write_model

_PART = """
import json, sys
import psutil, torch
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.types import Partition
from transformers import AutoModelForCausalLM

part, folder = sys.argv[1:]
torch.set_num_threads(1)
cut, size, held = Partition(1, 1), 64, []
ids_T = torch.arange(size) % 50
with torch.no_grad():
    if part == "whole":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model(ids_T[None])
        held = [model]
    elif part != "imports":
        checkpoint = open_checkpoint(folder)
        if part == "client":
            first = load_input_blocks(checkpoint, cut, dtype=torch.float32)
            last = load_output_blocks(checkpoint, cut, dtype=torch.float32)
            last.loss(first(ids_T, (size,)), (size,), ids_T)
            held = [first.model, last.model]
        else:
            trunk = load_trunk(checkpoint, cut.trunk(checkpoint.num_blocks), dtype=torch.float32)
            trunk(torch.zeros(size, trunk.hidden_size), (size,))
            held = [trunk.model]
num = sum(p.numel() for model in held for p in model.parameters())
print(json.dumps({"rss_bytes": psutil.Process().memory_info().rss, "parameters": num}))
"""


def main() -> None:
    """Measure, and print the line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="100m")
    options = parser.parse_args()
    name = "tiny" if options.tiny else options.shape
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES[name])
        found = {part: _measure(part, folder) for part in ("imports", "client", "trunk", "whole")}
    base = found["imports"]["rss_bytes"]
    figures: dict[str, float] = {"imports_mb": base / 1e6}
    for part in ("client", "trunk", "whole"):
        figures[f"{part}_mb"] = (found[part]["rss_bytes"] - base) / 1e6
        figures[f"{part}_parameters"] = found[part]["parameters"]
    figures["client_over_whole_memory"] = figures["client_mb"] / figures["whole_mb"]
    figures["client_over_whole_parameters"] = figures["client_parameters"] / figures["whole_parameters"]
    settings = {"shape": name, "input_blocks": 1, "output_blocks": 1, "tokens": 64, "dtype": "float32"}
    finish("client_memory", settings, figures, options.out)


def _measure(part: str, folder: str) -> dict[str, int]:
    command = [sys.executable, "-c", _PART, part, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(result.stdout.strip().splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
