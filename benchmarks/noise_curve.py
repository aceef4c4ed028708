"""How much of the text is read at every cut without noise, and at one cut under more and more of it?

python benchmarks/noise_curve.py --model MODELDIR --text TEXTS.jsonl --out noise_curve
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, finish
from _privacy import FULL, TINY, Study

from fedsea.audit.training import SplitRun
from fedsea.types import Partition

RHOS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
MIDDLE = Partition(1, 1)
BEAM_WITHOUT_NOISE = 4


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = arguments(__doc__)
    assets = Path(str(files("fedsea"))) / "assets"
    silos = [str(file) for file in sorted((assets / "silos").glob("*.jsonl"))]
    parser.add_argument(
        "--model", default=str(assets / "model"), help="folder of a trained model; else the shipped one"
    )
    parser.add_argument("--text", nargs="+", default=silos, help="files of JSON lines; else the shipped silos")
    parser.add_argument("--texts", type=int, default=32, help="texts under attack")
    parser.add_argument("--tokens", type=int, default=33, help="of each, the beginning token among them")
    parser.add_argument("--beam", type=int, default=64, help="hypotheses of a text that the search keeps under noise")
    parser.add_argument("--draws", type=int, default=4, help="of the noise for every text; their mean counts")
    parser.add_argument(
        "--beams", type=int, nargs="+", default=[], help="hypotheses of further searches, under the last of the noises"
    )
    parser.add_argument("--rhos", type=float, nargs="+", default=RHOS, help="noise norms, as shares of the hidden norm")
    parser.add_argument("--from-start", action="store_true", help="texts from their start instead of from inside")
    args = parser.parse_args()
    if args.tiny:
        args.texts, args.tokens, args.beam, args.draws, args.rhos, args.beams = 2, 12, 4, 2, RHOS[::4], [1, 2]
    return args


def channels(study: Study, cut: Partition) -> dict[str, Any]:
    """What each channel gives away without noise."""
    plan = study.plan(cut)
    targets = study.observe(plan)
    row = {"k": cut.input_blocks, "m": cut.output_blocks}
    return row | {"forward": study.forward(plan, targets), "backward": study.backward(plan, targets)}


def searched(study: Study, scale: float, rho: float, num_draws: int) -> dict[str, Any]:
    """What the attack on the hidden states gets out of them under so much noise."""
    plan = study.plan(MIDDLE, rho * scale)
    return {"rho": rho, **study.forward(plan, *(study.observe(plan) for _ in range(num_draws if rho else 1)))}


def under_noise(study: Study, scale: float, rho: float, num_draws: int) -> dict[str, Any]:
    """A point of the curve: the attack on the hidden states, and what the model is worth."""
    worth = SplitRun(study.plan(MIDDLE, rho * scale), study.checkpoint).perplexity(study.held)
    return {**searched(study, scale, rho, num_draws), "perplexity": worth}


def main() -> None:
    """Measure, and print the line of JSON."""
    args = options()
    torch.set_num_threads(args.threads)
    base = TINY if args.tiny else FULL
    sizes = replace(
        base,
        targets=args.texts,
        tokens=args.tokens,
        held=args.texts,
        public=8,
        beam=args.beam,
        inside=not args.from_start,
    )
    study = Study(args.model, sizes)
    study.read([Path(text) for text in args.text])
    plain = replace(study, sizes=replace(sizes, beam=min(args.beam, BEAM_WITHOUT_NOISE)))
    most = study.checkpoint.num_blocks
    cuts = [Partition(k, m) for k in range(4) for m in range(3) if k + m < most]
    every_cut, curve = [], []
    for cut in cuts[:1] if args.tiny else cuts:
        every_cut.append(channels(plain, cut))
        row = every_cut[-1]
        shares = f"forward {row['forward']['recovery']:.3f}, backward {row['backward']['recovery']:.3f}"
        print(f"k = {cut.input_blocks}, m = {cut.output_blocks}: {shares}", file=sys.stderr)
    scale = study.scales(MIDDLE)[0]
    for rho in args.rhos:
        curve.append(under_noise(study, scale, rho, args.draws))
        low, high = curve[-1]["interval"]
        print(f"rho {rho:g}: {curve[-1]['recovery']:.3f} ({low:.3f} to {high:.3f})", file=sys.stderr)
    by_beam = []
    for beam in args.beams:
        narrow = replace(study, sizes=replace(sizes, beam=beam))
        by_beam.append({"beam": beam, **searched(narrow, scale, args.rhos[-1], args.draws)})
        print(f"rho {args.rhos[-1]:g}, {beam} hypotheses: {by_beam[-1]['recovery']:.3f}", file=sys.stderr)
    figures = {"prior": study.prior(), "every_cut": every_cut, "curve": curve, "by_beam": by_beam}
    settings = {
        "model": Path(args.model).name,
        "text": [Path(text).name for text in args.text],
        "texts": len(study.attacked),
        "tokens": args.tokens,
        "beam": args.beam,
        "beams": args.beams,
        "draws": args.draws,
        "from_start": args.from_start,
        "tiny": args.tiny,
    }
    finish("noise_curve", settings, figures, args.out)


if __name__ == "__main__":
    main()
