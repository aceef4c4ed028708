"""`fedsea init`: what it writes loads, equals the defaults, and names commands that exist."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from fedsea.cli import main
from fedsea.cli.init import DEFAULT_MODEL, texts
from fedsea.cli.plan_text import plan_text, settings_text
from fedsea.plan import ClientEntry, ClientLimits, FederationPlan, ModelSection, load_limits, load_plan
from fedsea.plan.pseudonyms import PseudonymSettings


def test_the_written_plan_equals_the_defaults(tmp_path: Path) -> None:
    assert main.run(["init", str(tmp_path / "f"), "--clients", "clinic,bank"]) == 0
    clients = (ClientEntry(name="clinic"), ClientEntry(name="bank"))
    expected = FederationPlan(model=ModelSection(path=DEFAULT_MODEL), clients=clients)
    assert load_plan(tmp_path / "f" / "plan.toml") == expected


def test_the_written_settings_equal_the_default_limits(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text(settings_text())
    assert load_limits(tmp_path / "client.toml") == ClientLimits()
    assert set(tomllib.loads(settings_text())["limits"]) == set(ClientLimits.model_fields)


def test_the_settings_show_every_key_of_pseudonyms_with_its_default() -> None:
    _, _, shown = settings_text().partition("# [pseudonyms]\n")
    values = tomllib.loads("\n".join(line.removeprefix("# ") for line in shown.splitlines() if " = " in line))
    assert values.keys() == PseudonymSettings.model_fields.keys()
    assert PseudonymSettings.model_validate(values) == PseudonymSettings()


def test_the_settings_say_how_to_install_what_pseudonyms_need() -> None:
    told, _, _ = settings_text().partition("# [pseudonyms]\n")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert 'pip install ".[pseudonyms]"' in told.splitlines()[-1]
    assert "pseudonyms" in project["optional-dependencies"]


def test_every_key_of_the_plan_is_written_and_explained() -> None:
    lines = plan_text("m", ["a"]).splitlines()
    values = tomllib.loads("\n".join(lines))
    for key, field in FederationPlan.model_fields.items():
        section: Any = field.annotation
        names = set(getattr(section, "model_fields", {})) - {"fingerprint"}
        assert names <= set(values[key] if names else ()), key
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#") and not line.startswith("name"):
            assert lines[number - 1].startswith("# "), f"{line} is not explained"


def test_the_values_that_a_client_may_have_of_its_own_load_when_uncommented() -> None:
    text = plan_text("m", ["a"]).replace("# input_blocks", "input_blocks").replace("# micro", "micro")
    entry = tomllib.loads(text)["clients"][0]
    assert ClientEntry.model_validate(entry).micro_batch_sequences == 4


def test_the_readme_names_commands_and_options_that_exist() -> None:
    root: Any = typer.main.get_command(main.app)
    lines = [line.split() for line in texts("m", ["a"])["README.md"].splitlines() if line.startswith("    fedsea ")]
    assert lines
    for _, *words in lines:
        command = root
        while getattr(command, "commands", None):
            command = command.commands[words.pop(0)]
        known = {option for param in command.params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_a_client_is_not_told_to_use_a_file_that_only_the_operator_has() -> None:
    readme = texts("m", ["a"])["README.md"]
    assert not [line for line in readme.splitlines() if line.startswith("    fedsea ") and "client.toml" in line]
    assert "copies `client.toml` to its\nmachine" in readme


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "client.toml").write_text("mine")
    assert main.run(["init", str(tmp_path)]) == 2
    assert "client.toml already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["client.toml"]


@pytest.mark.parametrize("clients", ["", "Clinic!", "a,a"])
def test_names_that_cannot_be_clients_write_nothing(tmp_path: Path, clients: str) -> None:
    assert main.run(["init", str(tmp_path / "f"), "--clients", clients]) == 2
    assert not (tmp_path / "f").exists()


def test_a_folder_with_the_model_is_written_so_that_the_plan_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main.run(["init", "f", "--model", "llama"]) == 0
    assert load_plan(tmp_path / "f" / "plan.toml").model.path == str(tmp_path / "llama")


def test_json_lists_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["init", str(tmp_path / "f"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [Path(file).name for file in files] == ["plan.toml", "client.toml", "README.md"]


def test_the_readme_says_that_every_client_enrols_under_its_own_name() -> None:
    assert (
        "Each under its own name in the plan (bank, clinic); this is for bank:"
        in texts("m", ["bank", "clinic"])["README.md"]
    )
