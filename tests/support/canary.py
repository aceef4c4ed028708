"""A text that must be found nowhere but at its owner, and the forms in which it might be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from tests.support.federation import Federation

CANARY = "Zebulon Quasimir 0471-993"

TRUST = {
    "trusted-server": {},
    "noised": {
        "trust": {"mode": "noised"},
        "noise": {"hidden_std": 0.1, "gradient_std": 0.001, "update_std": 0.001, "hidden_clip": 20.0},
    },
}
"""Trust mode to the plan's sections for it."""


def forms(base_model: Path) -> list[bytes]:
    """The canary as text, escaped text, and as lists of its token ids as they might be printed or stored."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    found = [CANARY.encode(), CANARY.split()[0].encode(), json.dumps(CANARY).encode(), CANARY.encode("utf-16-le")]
    for text in (CANARY, " " + CANARY):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][2:10]
        found += [separator.join(map(str, ids)).encode() for separator in (", ", ",", " ", "\n")]
        found += [np.array(ids, dtype=kind).tobytes() for kind in ("<i8", "<i4", "<i2", "<f4")]
    return found


def assert_absent(where: str, content: bytes, canary: list[bytes]) -> None:
    """Fails if the content holds the canary in any form."""
    assert not [form for form in canary if form in content], f"the canary is in {where}"


def plant(fed: Federation, name: str) -> None:
    """Let a client's silo be about nothing else."""
    rows = [json.dumps({"text": f"{CANARY} opens the door for {CANARY}"}) for _ in range(20)]
    fed.silos[name].write_text("\n".join(rows) + "\n")


_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(.*)")
_PIECE_BYTES = 16 << 20


def memory_of(pid: int, overlap: int) -> Iterator[bytes]:
    """What a process may have written: its heap, stacks and every other writable mapping, piece by piece.

    Args:
        pid: This process, or a child of it that runs or is stopped. Linux only.
        overlap: Bytes of a piece that the next one begins with, so that nothing is cut in two.
    """
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            found = _MAPPING.match(line)
            assert found is not None, line
            start, stop, rights, name = int(found[1], 16), int(found[2], 16), found[3], found[4]
            if not rights.startswith("rw") or name.startswith(("[vvar", "/dev/")):
                continue
            while start < stop:
                try:
                    memory.seek(start)
                    piece = memory.read(min(_PIECE_BYTES, stop - start))
                except OSError:  # set aside and never touched, or gone since
                    break
                if not piece:
                    break
                yield piece
                start += len(piece) if len(piece) <= overlap or start + len(piece) >= stop else len(piece) - overlap


def found_in_memory(pid: int, wanted: Sequence[bytes]) -> set[bytes]:
    """Which of these are where the first of them is, in a process's writable memory; none if none is anywhere.

    Zeros are left out on both sides: text and ids are then the same in every width, and the search is fast.
    """
    squeezed = {one: one.replace(b"\0", b"") for one in wanted}
    shorts = set(squeezed.values())
    for piece in memory_of(pid, max(map(len, wanted))):
        content = piece.translate(None, b"\0")
        if here := {short for short in shorts if short in content}:
            return {one for one, short in squeezed.items() if short in here}
    return set()
