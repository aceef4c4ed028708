"""Runs every benchmark at its tiny size, two at a time, and checks the form of its result. Exits with 1 if one fails.

python scripts/check_benchmarks.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
AT_ONCE = 2
"""Nothing is measured at this size, and most of a benchmark's time goes into loading libraries on one core."""
LONG = ("quickstart.py", "privacy_utility.py", "client_memory.py", "client_scaling.py")
"""What takes longest begins first, so that none of them is left over alone at the end."""
KEYS = {"benchmark", "commit", "machine", "settings", "figures"}


def fault(script: Path) -> str:
    """What is wrong with a benchmark at its tiny size; empty if nothing is."""
    start = time.monotonic()
    run = subprocess.run([sys.executable, str(script), "--tiny"], capture_output=True, text=True, check=False)
    print(f"{script.name:24} {time.monotonic() - start:5.0f} s", flush=True)
    if run.returncode:
        return f"{script.name} ended with exit code {run.returncode}:\n{run.stderr}"
    try:
        result = json.loads(run.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        return f"{script.name}: the last line of its output is no JSON:\n{run.stdout[-2000:]}"
    missing = KEYS - result.keys() if isinstance(result, dict) else KEYS
    return f"{script.name}: its result lacks {sorted(missing)}" if missing else ""


def main() -> int:
    """Run them all, then name the faults."""
    scripts = sorted(script for script in BENCHMARKS.glob("*.py") if not script.name.startswith("_"))
    if not scripts:
        print(f"There is no benchmark in {BENCHMARKS}.", file=sys.stderr)
        return 1
    scripts.sort(key=lambda script: LONG.index(script.name) if script.name in LONG else len(LONG))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        faults = [found for found in pool.map(fault, scripts) if found]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
