"""What does the papers' noise cost, and what does it hide? Recovery against perplexity, for every cut.

python benchmarks/privacy_utility.py --model MODELDIR --text TEXTS.jsonl --out privacy_utility
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, finish
from _privacy import FULL, TINY, Study

from fedsea.types import Partition

RHOS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
CROSS_RHOS = (0.0, 4.0)
FEW_RHOS = (0.0, 1.0, 4.0)
EPOCHS = (1, 4, 16)
MIDDLE = Partition(1, 1)

Row = dict[str, Any]


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder of a trained model; by default the one that fedsea ships")
    parser.add_argument("--text", nargs="+", help="files of JSON lines with a field text; by default the shipped silos")
    return parser.parse_args()


def cuts(num_blocks: int, inputs: Iterable[int], outputs: Iterable[int]) -> list[Partition]:
    """Cuts that leave a trunk."""
    outputs = list(outputs)
    return [Partition(k, m) for k in inputs for m in outputs if k + m < num_blocks]


class Grid:
    """Measures points, and says on the way what was measured.

    Args:
        study: Model and texts.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._scales: dict[Partition, tuple[float, float]] = {}
        self._started = time.monotonic()

    def scales(self, cut: Partition) -> tuple[float, float]:
        """See `Study.scales`; taken once a cut."""
        if cut not in self._scales:
            self._scales[cut] = self.study.scales(cut)
        return self._scales[cut]

    def point(self, cut: Partition, rho: float, *, train: bool, both: bool, forward: bool = True) -> Row:
        """One point.

        Args:
            cut: Where the model is cut.
            rho: Noise over signal, by root mean square, on the hidden states.
            train: Train under the noise before anything is measured.
            both: The same relative noise on the gradients, too; else on the forward channel alone, as in the paper.
            forward: Attack the forward channel by itself.
        """
        study = self.study
        hidden, gradient = (rho * scale for scale in self.scales(cut))
        plan = study.plan(cut, hidden, gradient if both else 0.0)
        split = study.trained(plan) if train else None
        targets = study.observe(plan, split)
        row: Row = {"k": cut.input_blocks, "m": cut.output_blocks, "rho": rho, "trained": train, "both": both}
        if forward:
            row["forward"] = study.forward(plan, targets)
        row["backward"] = study.backward(plan, targets)
        row["best"] = max(row[side]["recovery"] for side in ("forward", "backward") if side in row)
        row["best_excess"] = max(row[side]["excess"] for side in ("forward", "backward") if side in row)
        judge = split or self._untrained(plan)
        row["perplexity"] = judge.perplexity(study.held)
        self._tell(row)
        return row

    def _untrained(self, plan: Any) -> Any:
        from fedsea.audit.training import SplitRun

        return SplitRun(plan, self.study.checkpoint)

    def _tell(self, row: Row) -> None:
        sides = " ".join(f"{s} {row[s]['recovery']:.3f}" for s in ("forward", "backward") if s in row)
        where = f"k={row['k']} m={row['m']} rho={row['rho']:g} trained={row['trained']:d} both={row['both']:d}"
        print(f"{time.monotonic() - self._started:6.0f} s  {where}  {sides}  ppl {row['perplexity']:.2f}", flush=True)

    def more(self, what: str, make: Callable[[], Any]) -> Any:
        """A figure outside the grid."""
        found = make()
        print(f"{time.monotonic() - self._started:6.0f} s  {what}  {found}", flush=True)
        return found


def measure(grid: Grid, *, tiny: bool) -> dict[str, Any]:
    """All figures."""
    study, blocks = grid.study, grid.study.checkpoint.num_blocks
    rhos = (0.0, 2.0) if tiny else RHOS
    untrained = [
        grid.point(cut, rho, train=False, both=False)
        for cut in cuts(blocks, range(4), (1,))
        for rho in rhos
    ]  # fmt: skip
    crossed = [
        grid.point(cut, rho, train=False, both=False, forward=False)
        for cut in cuts(blocks, range(4), (0, 2))
        for rho in ((0.0,) if tiny else CROSS_RHOS)
    ]
    others = [] if tiny else cuts(blocks, (1,), (0, 2))
    both = [grid.point(MIDDLE, rho, train=False, both=True) for rho in rhos[1:]]
    both += [grid.point(cut, rho, train=False, both=True) for cut in others for rho in FEW_RHOS[1:]]
    trained = [grid.point(MIDDLE, rho, train=True, both=False) for rho in rhos]
    others += [] if tiny else cuts(blocks, (0, 2, 3), (1,))
    trained += [grid.point(cut, rho, train=True, both=False) for cut in others for rho in FEW_RHOS]
    trained += [grid.point(MIDDLE, rho, train=True, both=True) for rho in rhos[1:]]

    def averaged(rho: float, epochs: int) -> Row:
        plan = study.plan(MIDDLE, rho * grid.scales(MIDDLE)[0])
        return study.averaged(plan, study.observe(plan, epochs=epochs)) | {"rho": rho, "epochs": epochs}

    def inverter(rho: float) -> Row:
        plan = study.plan(MIDDLE, rho * grid.scales(MIDDLE)[0])
        return study.inverter(plan, study.observe(plan)) | {"rho": rho}

    alone_steps = study.sizes.steps * (1 if tiny else 3)
    alone_cuts = cuts(blocks, (1,), (1,)) if tiny else cuts(blocks, range(4), range(3))
    return {
        "untrained": untrained,
        "backward_at_every_cut": crossed,
        "both_channels": both,
        "trained": trained,
        "epochs": [grid.more("epochs", lambda e=e: averaged(4.0, e)) for e in (EPOCHS[:1] if tiny else EPOCHS)],
        "inverter": [grid.more("inverter", lambda r=r: inverter(r)) for r in ((0.0,) if tiny else (0.0, 1.0, 2.0))],
        "without_a_server": [
            {
                "k": cut.input_blocks,
                "m": cut.output_blocks,
                "steps": alone_steps,
                "perplexity": grid.more("alone", lambda c=cut: study.without_a_server(c, alone_steps)),
            }
            for cut in alone_cuts
        ],
        "counted": study.counted(),
        "prior": study.figure(study.targets(), _guessed(study))["recovery"],
    }


def _guessed(study: Study) -> list[Any]:
    from fedsea.audit.attacks import a0_prior

    return a0_prior.run(study.attacker(study.plan(MIDDLE)), study.targets())


def main() -> None:
    """Measure, and print the line of JSON."""
    asked = options()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    assets = Path(str(files("fedsea"))) / "assets"
    sizes = TINY if asked.tiny else FULL
    study = Study(asked.model or str(assets / "model"), sizes)
    study.read([Path(text) for text in asked.text] if asked.text else sorted((assets / "silos").glob("*.jsonl")))
    grid = Grid(study)
    figures = measure(grid, tiny=asked.tiny)
    settings = {
        "model": Path(study.model).name,
        "text": [Path(text).name for text in asked.text] if asked.text else ["the shipped silos"],
        "num_blocks": study.checkpoint.num_blocks,
        "hidden_size": study.checkpoint.hidden_size,
        "vocab_size": study.vocab_size,
        **vars(sizes),
    }
    finish("privacy_utility", settings, figures, asked.out)


if __name__ == "__main__":
    main()
