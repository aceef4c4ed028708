"""Write the quickstart's three silos, or the base model's corpus, from the templates in `texts/`.

    python scripts/make_silos.py --out src/fedsea/assets/silos
    python scripts/make_silos.py --base --out /tmp/base

Everything is invented: people, places and dates come from Faker under a fixed seed, facts from the template files.
The same seed and the same version of Faker give the same bytes; the version is recorded in `manifest.json`.

A template is text with slots. `{slot}` takes its value once a row, so a prompt and its completion agree on it;
`{^slot}` begins with a capital; `{name:2-9}` is a whole number that later `{name}` repeats. Values may hold slots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import faker
from faker import Faker
from faker.providers.lorem import en_US as lorem
from rich.progress import track

TEXTS = Path(__file__).parent / "texts"
WORDS = sorted({*(TEXTS / "words.txt").read_text(encoding="utf-8").split(), *lorem.Provider.word_list})
SILOS = ("clinic", "bank", "law-office")
SLOT = re.compile(r"\{(\^?)(\w+)(?::(\d+)-(\d+))?\}")
YEAR = (date(2025, 1, 1), date(2025, 12, 31))


class Row:
    """Values of one row's slots, drawn on first use.

    Args:
        slots: Slot to its choices; a choice may hold slots itself.
        rng: Source of all choices.
        fake: Source of names, places and dates, seeded by the caller.
    """

    def __init__(self, slots: dict[str, Any], rng: random.Random, fake: Faker) -> None:
        self._slots, self._rng, self._fake = slots, rng, fake
        self._values: dict[str, str] = {}

    def fill(self, template: str) -> str:
        """The template with every slot filled, nested ones too.

        Raises:
            KeyError: A slot has no values.
        """
        while SLOT.search(template):
            template = SLOT.sub(self._value, template)
        return template

    def _value(self, match: re.Match[str]) -> str:
        capital, name, low, high = match.groups()
        if name not in self._values:
            if low is not None:
                self._values[name] = str(self._rng.randint(int(low), int(high)))
            elif name in self._slots:
                choices = self._slots[name]
                self._values[name] = self.fill(choices if isinstance(choices, str) else self._rng.choice(choices))
            else:
                self._values.update(self._fact(name))
        value = self._values[name]
        return value[:1].upper() + value[1:] if capital else value

    def _fact(self, name: str) -> dict[str, str]:
        """Invented people, places and times; a person brings their names and pronouns along."""
        kind, number = re.fullmatch(r"([a-z]+)(\d*)", name).groups()  # type: ignore[union-attr]
        fake, rng = self._fake, self._rng
        if kind in {"person", "first", "last", "title", "he"}:
            man = rng.random() < 0.5
            first, last = fake.first_name_male() if man else fake.first_name_female(), fake.last_name()
            title, he = ("Mr", "he") if man else ("Ms", "she")
            person = {"person": f"{first} {last}", "first": first, "last": last, "title": title, "he": he}
            return {key + number: value for key, value in person.items()}
        day = fake.date_between(*YEAR)
        facts: dict[str, Callable[[], str]] = {
            "other": lambda: fake.first_name(),
            "city": lambda: fake.city(),
            "street": lambda: f"{rng.randint(1, 99)} {fake.street_name()}",
            "company": lambda: fake.company(),
            "date": lambda: f"{day.day} {day:%B}",
            "month": lambda: f"{day:%B}",
            "weekday": lambda: f"{day:%A}",
            "time": lambda: f"{rng.randint(8, 19)}:{rng.randrange(0, 60, 5):02d}",
            "job": lambda: fake.job().lower(),
            "word": lambda: rng.choice(WORDS),
            "sentence": lambda: fake.sentence(nb_words=rng.randint(5, 12), ext_word_list=WORDS),
            "ref": lambda: f"{rng.choice('ABCDEFGH')}{rng.randint(100, 999)}",
        }
        return {name: facts[kind]()}


def rows_of(texts: dict[str, Any], seed: int) -> Iterator[dict[str, str]]:
    """Rows of one template file, `prompt` and `completion` each, without repeats.

    Args:
        texts: The file: `rows`, `prompt`, `completion`, `slots`, and `cases` or `trades` with cases of their own.
            Without `pairs` any completion may answer any prompt.
        seed: Gives the same rows again.
    """
    rng, fake = random.Random(seed), Faker("en_US")
    fake.seed_instance(seed)
    groups = texts.get("trades", [texts])
    pairs = texts.get("pairs") or [[p, c] for p in range(len(texts["prompt"])) for c in range(len(texts["completion"]))]
    seen: set[str] = set()
    while len(seen) < texts["rows"]:
        group = rng.choice(groups)
        slots = {**texts["slots"], **group, **rng.choice(group["cases"])}
        row, (prompt, completion) = Row(slots, rng, fake), rng.choice(pairs)
        made = {"prompt": row.fill(texts["prompt"][prompt]), "completion": row.fill(texts["completion"][completion])}
        line = json.dumps(made)
        if line not in seen:
            seen.add(line)
            yield made


def write(name: str, out: Path, seed: int, filename: str | None = None) -> dict[str, Any]:
    """Write one template file's rows as jsonl.

    Returns:
        The file's entry for the manifest.
    """
    texts = tomllib.loads((TEXTS / f"{name}.toml").read_text(encoding="utf-8"))
    path = out / (filename or f"{name}.jsonl")
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for row in track(rows_of(texts, seed), description=name, total=texts["rows"])
    ]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return {"rows": len(lines), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--base", action="store_true", help="the base model's corpus instead of the silos")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base:
        write("trades", args.out, args.seed, "base.jsonl")
        return
    files = {f"{name}.jsonl": write(name, args.out, args.seed + i) for i, name in enumerate(SILOS)}
    manifest = {"synthetic": True, "seed": args.seed, "faker": faker.VERSION, "files": files}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
