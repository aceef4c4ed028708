"""How many planted identifiers become pseudonyms, by type, and do answers get their originals back?

python benchmarks/pseudonyms.py --out pseudonyms
python benchmarks/pseudonyms.py --notes 1000 --seed 1
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import arguments, finish

from fedsea.evaluation.notes.recall import measure
from fedsea.evaluation.notes.writer import Note, write_notes
from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms import Pseudonyms, open_pseudonyms


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--notes", type=int, default=1000, help="generated notes")
    parser.add_argument("--seed", type=int, default=1, help="which; 0 was looked at while the recogniser was written")
    options = parser.parse_args()
    count = 40 if options.tiny else options.notes
    notes = write_notes(count, options.seed)
    with tempfile.TemporaryDirectory(prefix="fedsea-benchmark-") as folder:
        pseudonyms = open_pseudonyms(PseudonymSettings(enabled=True), Path(folder), "benchmark")
        began = time.process_time()
        scores = measure(notes, pseudonyms.find)
        seconds = time.process_time() - began
        figures = {
            "types": {kind: one.to_dict() for kind, one in scores.items()},
            "by_language": {
                language: measure([n for n in notes if n.language == language], pseudonyms.find)["all"].to_dict()
                for language in ("de", "en")
            },
            **_round_trips(pseudonyms, notes, options.seed),
            "find_ms_per_1000_letters": 1e6 * seconds / sum(len(note.text) for note in notes),
        }
    import faker

    settings = {"notes": count, "seed": options.seed, "faker": faker.VERSION, "tiny": options.tiny}
    finish("pseudonyms", settings, figures, options.out)


def _round_trips(pseudonyms: Pseudonyms, notes: list[Note], seed: int) -> dict[str, Any]:
    """Notes as prompts, and an answer that quotes them whole, cut anywhere."""
    rng, exact, same, kept = random.Random(seed), 0, 0, 0
    began = time.process_time()
    rows = pseudonyms([note.text for note in notes])
    rewriting = time.process_time() - began
    for note, row in zip(notes, rows, strict=True):
        prompt = pseudonyms.prompt(note.text)
        same += prompt.text == row
        restorer, at, pieces = pseudonyms.restorer([prompt]), 0, []
        while at < len(prompt.text):
            step = rng.randrange(1, 12)
            pieces.append(restorer.push(prompt.text[at : at + step]))
            at += step
        exact += "".join([*pieces, restorer.finish()]) == note.text
        covered = {letter for span in prompt.spans for letter in range(span.start, span.end)}
        kept += sum(
            re.search(rf"(?<![\w-]){re.escape(text)}(?![\w-])", prompt.text) is not None
            for plant, text in note.planted()
            if set(range(plant.start, plant.end)) <= covered
        )
    return {
        "restored_exactly": exact,
        "prompts_like_rows": same,
        "replaced_identifiers_left_in_their_prompt": kept,
        "mapping_entries": pseudonyms.num_entries,
        "replace_all_s": rewriting,
    }


if __name__ == "__main__":
    main()
