"""What does the quickstart find, and how long does it take? The README's table comes from this result.

python benchmarks/quickstart.py --out quickstart
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _harness import arguments, finish

from fedsea.evaluation.quickstart import CLIENTS, QuickstartOptions, run
from fedsea.plan import load_plan


def main() -> None:
    """Run it, and print the line of JSON."""
    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "quickstart"
        few = {"steps": 1, "rows": 40} if options.tiny else {}
        found = run(QuickstartOptions(folder, **few))
        plan = load_plan(folder / "plan.toml")
    alone = found.val_loss["alone"]
    figures = {
        "val_loss": found.val_loss,
        "by_silo": found.by_silo,
        "federated_over_central": found.val_loss["federated"] / found.val_loss["central"],
        "federated_below_every_alone": found.val_loss["federated"] < min(alone.values()),
        "bytes_by_kind": found.bytes_by_kind,
        "phases_s": found.phases_s,
        "seconds": found.seconds,
    }
    settings = {"steps": plan.num_steps, "clients": list(CLIENTS), "plan_sha256": plan.sha256()[:16]}
    finish("quickstart", settings, figures, options.out)


if __name__ == "__main__":
    main()
