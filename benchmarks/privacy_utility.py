"""What does the papers' noise cost, and what does it hide? Recovery against perplexity, for every cut.

python benchmarks/privacy_utility.py --model MODELDIR --text TEXTS.jsonl --out privacy_utility
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, finish
from _privacy import FULL, TINY, Study

from fedsea.audit.training import SplitRun
from fedsea.types import Partition

RHOS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
SOME_RHOS = (0.0, 4.0)
EPOCHS = (1, 4, 16)
MIDDLE = Partition(1, 1)

Row = dict[str, Any]


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder of a trained model; by default the one that fedsea ships")
    parser.add_argument("--text", nargs="+", help="files of JSON lines with a field text; by default the shipped silos")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    return parser.parse_args()


def cuts(num_blocks: int, inputs: Iterable[int], outputs: Iterable[int]) -> list[Partition]:
    """Cuts that leave a trunk."""
    outputs = list(outputs)
    return [Partition(k, m) for k in inputs for m in outputs if k + m < num_blocks]


@dataclass(frozen=True)
class Task:
    """One thing to measure, by the name of a method of `Grid`."""

    table: str
    what: str
    arguments: dict[str, Any]


def tasks(num_blocks: int, *, tiny: bool) -> list[Task]:
    """Everything to measure, the tables in their order."""
    rhos, some = ((0.0, 2.0), (0.0,)) if tiny else (RHOS, SOME_RHOS)
    others = [] if tiny else cuts(num_blocks, (1,), (0, 2))
    aside = others + ([] if tiny else cuts(num_blocks, (0, 2, 3), (1,)))
    found = []

    def points(table: str, where: Iterable[Partition], at: Iterable[float], **how: bool) -> None:
        found.extend(Task(table, "point", {"cut": cut, "rho": rho, **how}) for cut in where for rho in at)

    every = ((1,), (0,)) if tiny else (range(4), range(3))
    points("untrained", cuts(num_blocks, every[0], (1,)), rhos, backward=False)
    points("backward_at_every_cut", cuts(num_blocks, *every), some, forward=False)
    points("both_channels", [] if tiny else [MIDDLE], rhos[1:], both=True)
    points("both_channels", others, (1.0, 4.0), both=True)
    points("trained", [] if tiny else [MIDDLE], rhos, train=True)
    points("trained", aside, (1.0, 4.0), train=True)
    points("trained", [MIDDLE], rhos[1:], train=True, both=True)
    found += [Task("epochs", "averaged", {"rho": 4.0, "epochs": e}) for e in (EPOCHS[:1] if tiny else EPOCHS)]
    found += [Task("inverter", "inverter", {"rho": rho}) for rho in ((0.0,) if tiny else (0.0, 1.0, 2.0))]
    found += [Task("without_a_server", "alone", {"cut": cut}) for cut in ([MIDDLE] if tiny else [MIDDLE, *aside])]
    return found


class Grid:
    """Measures one thing after another.

    Args:
        study: Model and texts.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._scales: dict[Partition, tuple[float, float]] = {}

    def scales(self, cut: Partition) -> tuple[float, float]:
        """See `Study.scales`; taken once a cut."""
        if cut not in self._scales:
            self._scales[cut] = self.study.scales(cut)
        return self._scales[cut]

    def point(
        self,
        cut: Partition,
        rho: float,
        *,
        train: bool = False,
        both: bool = False,
        forward: bool = True,
        backward: bool = True,
    ) -> Row:
        """One point.

        Args:
            cut: Where the model is cut.
            rho: Noise over signal, by root mean square, on the hidden states.
            train: Train under the noise before anything is measured.
            both: The same relative noise on the gradients, too; else on the forward channel alone, as in the paper.
            forward: Attack the forward channel by itself.
            backward: Attack the gradients; without noise they always give everything.
        """
        study = self.study
        hidden, gradient = (rho * scale for scale in self.scales(cut))
        plan = study.plan(cut, hidden, gradient if both else 0.0)
        split = study.trained(plan) if train else SplitRun(plan, study.checkpoint)
        targets = study.observe(plan, split if train else None)
        row: Row = {"k": cut.input_blocks, "m": cut.output_blocks, "rho": rho, "trained": train, "both": both}
        if forward:
            row["forward"] = study.forward(plan, targets)
        if backward:
            row["backward"] = study.backward(plan, targets)
        row["best"] = max(row[side]["recovery"] for side in ("forward", "backward") if side in row)
        row["best_excess"] = max(row[side]["excess"] for side in ("forward", "backward") if side in row)
        row["perplexity"] = split.perplexity(study.held)
        return row

    def averaged(self, rho: float, epochs: int) -> Row:
        """A4 at the middle cut."""
        plan = self.study.plan(MIDDLE, rho * self.scales(MIDDLE)[0])
        found = self.study.averaged(plan, self.study.observe(plan, epochs=epochs))
        return {"rho": rho, "epochs": epochs, **found}

    def inverter(self, rho: float) -> Row:
        """A3 at the middle cut."""
        plan = self.study.plan(MIDDLE, rho * self.scales(MIDDLE)[0])
        return {"rho": rho, **self.study.inverter(plan, self.study.observe(plan))}

    def alone(self, cut: Partition) -> Row:
        """What a client gets without any trunk, in three times the steps."""
        steps = 3 * self.study.sizes.steps
        perplexity = self.study.without_a_server(cut, steps)
        return {"k": cut.input_blocks, "m": cut.output_blocks, "steps": steps, "perplexity": perplexity}


_GRID: list[Grid] = []


def _begin(model: str, texts: list[Path], tiny: bool, threads: int) -> None:
    """In each process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    study = Study(model, TINY if tiny else FULL)
    study.read(texts)
    _GRID[:] = [Grid(study)]


def _do(task: Task) -> Row:
    row: Row = getattr(_GRID[0], task.what)(**task.arguments)
    return row


def measure(todo: list[Task], jobs: int, *settings: Any) -> dict[str, list[Row]]:
    """All tables."""
    tables: dict[str, list[Row]] = {}
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, settings) as pool:
        for task, row in zip(todo, pool.map(_do, todo), strict=True):
            tables.setdefault(task.table, []).append(row)
            print(f"{time.monotonic() - started:6.0f} s  {task.table}  {_short(row)}", flush=True)
    return tables


def _short(row: Row) -> str:
    plain = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    sides = {side: row[side]["recovery"] for side in ("forward", "backward") if side in row}
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in
                    (plain | sides).items())  # fmt: skip


def main() -> None:
    """Measure, and print the line of JSON."""
    asked = options()
    assets = Path(str(files("fedsea"))) / "assets"
    model = asked.model or str(assets / "model")
    texts = [Path(text) for text in asked.text] if asked.text else sorted((assets / "silos").glob("*.jsonl"))
    _begin(model, texts, asked.tiny, asked.threads)
    study = _GRID[0].study
    todo = tasks(study.checkpoint.num_blocks, tiny=asked.tiny)
    tables = measure(todo, asked.jobs, model, texts, asked.tiny, asked.threads)
    figures = {**tables, "counted": study.counted(), "prior": study.prior()}
    settings = {
        "model": Path(model).name,
        "text": [text.name for text in texts],
        "num_blocks": study.checkpoint.num_blocks,
        "hidden_size": study.checkpoint.hidden_size,
        "vocab_size": study.vocab_size,
        **vars(study.sizes),
    }
    finish("privacy_utility", settings, figures, asked.out)


if __name__ == "__main__":
    main()
