"""Line coverage by room, from coverage.py's JSON report. Exits with 1 if a room is below its floor.

pytest --cov --cov-report=json:coverage.json && python scripts/check_coverage.py coverage.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FLOOR = 90.0
ROOMS = ("model", "wire", "server", "client", "federation")
"""Rooms that must reach the floor; the others are shown."""


def room_of(file: str) -> str:
    """`wire` for `…/fedsea/wire/codecs.py`, `fedsea` for a file at the top."""
    inside = Path(file).parts[Path(file).parts.index("fedsea") + 1 :]
    return inside[0] if len(inside) > 1 else "fedsea"


def by_room(report: dict[str, dict[str, dict[str, dict[str, int]]]]) -> dict[str, tuple[int, int]]:
    """Room to (lines run, lines in all)."""
    rooms: dict[str, tuple[int, int]] = {}
    for file, item in report["files"].items():
        covered, total = rooms.get(room_of(file), (0, 0))
        summary = item["summary"]
        rooms[room_of(file)] = covered + summary["covered_lines"], total + summary["num_statements"]
    return rooms


def main() -> int:
    """Print a table; 1 if a room is too low or absent."""
    rooms = by_room(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    low = [room for room in ROOMS if room not in rooms]
    for room, (covered, total) in sorted(rooms.items()):
        percent = 100.0 * covered / max(1, total)
        if room in ROOMS and percent < FLOOR:
            low.append(room)
        floor = f"at least {FLOOR:g} %" if room in ROOMS else ""
        print(f"{room:12} {percent:5.1f} % of {total:5} lines  {floor}")
    if low:
        print(f"below the floor: {', '.join(low)}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
