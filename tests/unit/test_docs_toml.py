"""Every piece of TOML in the documents can be put into what `fedsea init` writes, as the page says, and is read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedsea.cli import init
from fedsea.errors import ConfigError
from fedsea.plan import FederationPlan, load_plan, load_settings, no_claim_reason

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = re.compile(r"((?:[^\n]+\n)+)\n```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CASES = [
    pytest.param(said, body, id=f"{page.stem}-{number}")
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for number, (said, body) in enumerate(SNIPPET.findall(page.read_text(encoding="utf-8")))
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder as `fedsea init` leaves it."""
    init.write(tmp_path, init.texts("some/model", ["clinic", "bank", "law-office"]))
    return tmp_path


def tables(text: str) -> dict[tuple[str, str], tuple[int, str]]:
    """Table and key to the line that sets it, and its number."""
    found, table = {}, ""
    for number, line in enumerate(text.splitlines()):
        if heading := re.fullmatch(r"\[(\w+)\]\s*", line):
            table = heading[1]
        elif key := re.match(r"(\w+) = ", line):
            found[table, key[1]] = (number, line)
    return found


def changed(text: str, body: str) -> str:
    """A plan whose lines were changed to those of a piece of TOML; nothing is added."""
    lines, there = text.splitlines(), tables(text)
    for place, (_, line) in tables(body).items():
        lines[there[place][0]] = line
    return "\n".join(lines) + "\n"


def test_the_pages_have_examples_of_both_files():
    assert len(CASES) == sum(page.read_text().count("```toml") for page in (ROOT / "docs").rglob("*.md")) >= 4


@pytest.mark.parametrize(("said", "body"), CASES)
def test_an_example_can_be_put_where_its_page_says(written, said, body):
    values = tomllib.loads(body)
    if set(values) <= set(FederationPlan.model_fields):
        assert re.search(r"change these\s+lines", said, re.IGNORECASE)
        path = written / "plan.toml"
        path.write_text(changed(path.read_text(encoding="utf-8"), body), encoding="utf-8")
        load_plan(path)
    else:
        assert "At the end of" in said
        path = written / "client.toml"
        path.write_text(f"{path.read_text(encoding='utf-8')}\n{body}", encoding="utf-8")
        load_settings(path)
    now = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {table: {key: now[table][key] for key in keys} for table, keys in values.items()} == values


def test_what_the_page_on_noise_says_can_be_accounted_for_is_with_the_plan_of_init(written):
    page = (ROOT / "docs" / "how-to" / "noise-and-audit.md").read_text(encoding="utf-8")
    path = written / "plan.toml"
    path.write_text(changed(path.read_text(encoding="utf-8"), SNIPPET.findall(page)[1][1]), encoding="utf-8")
    plan = load_plan(path)
    assert not any(no_claim_reason(plan, name) for name in plan.client_names)


def test_a_table_that_is_added_a_second_time_is_told_so(written):
    path = written / "plan.toml"
    path.write_text(f'{path.read_text(encoding="utf-8")}\n[trust]\nmode = "noised"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the table \[trust\] comes twice \(at line \d+, column \d+\); change the"):
        load_plan(path)
