"""Processes that a run of the checks left behind. Ends them, names them, and exits with 1.

Every process that the checks start inherits FEDSEA_CI_RUN; whoever still carries its value at the end is left over.

    FEDSEA_CI_RUN=some-unique-word python scripts/check_processes.py
"""

from __future__ import annotations

import os
import sys

import psutil

MARK = "FEDSEA_CI_RUN"
GRACE_S = 5.0


def left_over(value: str) -> list[psutil.Process]:
    """Other processes with this value of the mark, without those that started this one."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.pid not in own and process.environ().get(MARK) == value
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return found


def main() -> int:
    """Wait a moment for those that are just ending, then end the rest."""
    _, alive = psutil.wait_procs(left_over(os.environ[MARK]), timeout=GRACE_S)
    for process in alive:
        try:
            print(f"left over: process {process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    if not alive:
        print("no process was left behind")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
