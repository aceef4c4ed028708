"""What the documents say is there: commands, options, keys, links, examples, generated pages."""

import ast
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from fedsea.cli.main import app
from fedsea.plan import ClientLimits, FederationPlan, no_claim_reason, parse_plan
from scripts import make_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
COMMANDS = typer.main.get_command(app)


def name_of(page):
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def fenced(page, language):
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def defaults(command):
    """Texts that are some option's default; one of them may look like a command."""
    own = {parameter.default for parameter in command.params if isinstance(parameter.default, str)}
    return own.union(*(defaults(child) for child in getattr(command, "commands", {}).values()))


def command_lines(page):
    """Every shell command of a page, as words: bash blocks, services, and inline code that begins with fedsea."""
    text = page.read_text(encoding="utf-8")
    lines = [line for body in fenced(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += [
        line.partition("=")[2] for body in fenced(page, "ini") for line in body.splitlines() if "ExecStart=" in line
    ]
    inline = INLINE.findall(FENCE.sub("", text))
    lines += [code for code in inline if code.startswith("fedsea ") and code not in defaults(COMMANDS)]
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words:
                yield [word for word in words if word not in ("…", "...")]


def problems_of_fedsea(words):
    """Walk the command tree along the words; what is not in it."""
    command = COMMANDS
    for word in words:
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options |= {"--help", "-h"}
        children = getattr(command, "commands", {})
        if word.startswith("-"):
            if word.partition("=")[0] not in options:
                yield f"`fedsea {' '.join(words)}`: {command.name} has no option {word}"
        elif word in children:
            command = children[word]
        elif children and not word.isupper():
            yield f"`fedsea {' '.join(words)}`: there is no command {word}"
            return


def slug(heading):
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_the_pages_are_found():
    assert len(PAGES) > 15


@pytest.mark.parametrize("words", [["ca", "approv", "x.pem"], ["train", "--serve", "host:1"], ["ca", "list", "--host"]])
def test_a_wrong_command_or_option_would_be_found(words):
    assert list(problems_of_fedsea(words))


@pages
def test_every_fedsea_command_exists_with_its_options(page):
    found = [
        problem
        for words in command_lines(page)
        if Path(words[0]).name == "fedsea"
        for problem in problems_of_fedsea(words[1:])
    ]
    assert not found


@pages
def test_every_script_and_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in command_lines(page):
        if words[0] == "make":
            assert set(words[1:]) <= targets
        if words[0].startswith("python") and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words[1]
        if words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-")), words


@pages
def test_links_inside_the_repository_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
GENERATED = re.compile(r"Written by scripts/|(begin|end): ")


def placeholders(text):
    """Comments that stand for something to come: all but those of generated pages and parts."""
    return [note.strip() for note in COMMENT.findall(text) if not GENERATED.match(note.strip())]


def test_a_placeholder_would_be_found():
    assert placeholders("a <!-- table: losses --> b <!-- begin: messages -->") == ["table: losses"]


@pages
def test_nothing_in_a_page_stands_for_something_to_come(page):
    text = page.read_text(encoding="utf-8")
    assert not placeholders(text)
    assert not re.findall(r"\b(TODO|TBD|FIXME|XXX)\b", text)


def test_every_page_of_the_documentation_is_in_its_contents():
    contents = ROOT / "docs" / "README.md"
    linked = {(contents.parent / link.partition("#")[0]).resolve() for link in LINK.findall(contents.read_text())}
    assert {page for page in PAGES if "docs" in page.parts} - linked == {contents}


@pages
def test_plan_keys_in_code_are_keys_of_the_plan(page):
    sections = {name: field.annotation for name, field in FederationPlan.model_fields.items()}
    tables = {name: set(model.model_fields) for name, model in sections.items() if hasattr(model, "model_fields")}
    tables["limits"] = set(ClientLimits.model_fields)
    wrong = [
        code
        for code in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        for table, key in re.findall(r"^(\w+)\.(\w+)(?= = |$)", code)
        if table in tables and key not in tables[table] and key not in ("toml", "py", "json", "md")
    ]
    assert not wrong


@pages
def test_python_and_toml_in_the_documents_can_be_parsed(page):
    for body in fenced(page, "toml"):
        tomllib.loads(body)
    if page.name != "python.md":  # signatures, not statements
        for body in fenced(page, "python"):
            ast.parse(body)


def test_the_examples_of_noise_fit_the_plan_that_is_shipped():
    shipped = tomllib.loads((ROOT / "src" / "fedsea" / "assets" / "plan.toml").read_text(encoding="utf-8"))
    papers, accounted = fenced(ROOT / "docs" / "how-to" / "noise-and-audit.md", "toml")
    for example in (papers, accounted):
        changes = tomllib.loads(example)
        plan = parse_plan(shipped | {table: shipped.get(table, {}) | keys for table, keys in changes.items()})
        assert plan.trust.mode == "noised"
    assert plan.noise.epsilon
    assert not any(no_claim_reason(plan, name) for name in plan.client_names)


def test_the_threat_model_does_not_say_that_adapters_stay_where_they_are_shared():
    server = (ROOT / "docs" / "explanation" / "threat-model.md").read_text(encoding="utf-8").split("## ")[1]
    assert re.search(r"does not know the\s+client's text, tokens, labels and losses;", server)
    assert 'its adapters neither, with `aggregation.sync = "personal"`' in server


def test_the_generated_pages_are_up_to_date():
    stale = [path.name for path, text in make_reference.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `make docs`"


def test_the_exit_codes_are_in_order():
    rows = re.findall(r"^\| (\d+)", (ROOT / "docs/reference/cli.md").read_text().split("## ")[1], re.MULTILINE)
    assert len(rows) > 10
    assert rows == sorted(rows, key=int)
    said = [int(code) for code in re.findall(r"^\| `[A-Z_]+` \| (\d+)", make_reference.errors_block(), re.MULTILINE)]
    assert said == sorted(said)


def test_the_documents_say_how_many_model_types_are_compared():
    module = ast.parse((ROOT / "tests" / "parity" / "test_model_parity.py").read_text())
    tables = {node.targets[0].id: node.value for node in module.body if isinstance(node, ast.Assign)}
    types = {entry.elts[0].value for name in ("NAMED", "OTHERS") for entry in tables[name].values}
    for page in ("README.md", "docs/explanation/semantics.md"):
        assert re.findall(r"(\d+) model types", (ROOT / page).read_text()) == [str(len(types))], page


def test_every_key_of_the_plan_has_a_meaning():
    assert "|  |" not in make_reference.plan_page()


def test_all_installations_ask_for_the_package_s_own_range_of_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("torch"))
    for name in (".ci/run", "Makefile", "README.md"):
        asked = re.findall(r"torch>=[\d.]+,<[\d.]+", (ROOT / name).read_text())
        assert asked
        assert set(asked) == {wanted}


def test_the_example_trains(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["python_api.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / "python_api.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.count("held-out loss") == 2
    assert "step 2/2" in shown
