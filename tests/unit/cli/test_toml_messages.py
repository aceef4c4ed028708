"""What a wrong key in a plan or in a client's settings is told."""

from pathlib import Path
from typing import Any

import pytest

from fedsea.errors import ConfigError
from fedsea.plan import load_limits, load_plan, parse_plan
from tests.support.assets import toml


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}]} | values)
    return str(refused.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trainig": {}}, "trainig: unknown key; did you mean `training`?"),
        ({"training": {"round": 3}}, "training.round: unknown key; did you mean `rounds`?"),
        ({"clients": [{"name": "a", "input_block": 1}]}, "clients.0.input_block: unknown key; did you mean"),
        ({"training": {"learning_rate": 1.0}}, "`learning_rate` belongs to the table [optimizer]"),
        ({"rank": 8}, "`rank` belongs to the table [adapter]"),
        ({"durability": {"zzz": 8}}, "known here: keep, share_trunk"),
        ({"model": {}}, "model.path: is missing; add it"),
        ({"clients": [{"name": "A B"}]}, "is not usable: clients.0.name: use 1 to 63 lower-case letters"),
    ],
)
def test_a_key_that_is_none_is_pointed_to_the_one_that_was_meant(values: dict[str, Any], says: str) -> None:
    assert says in refusal(values)


@pytest.mark.parametrize("wait", ["al", 0, -1.5, [3]])
def test_a_wrong_wait_is_one_sentence(wait: Any) -> None:
    assert refusal({"training": {"wait": wait}}) == (
        'The plan is not usable: training.wait: give "all", or a number of seconds above 0'
    )


def test_wrong_targets_are_one_sentence() -> None:
    assert refusal({"adapter": {"targets": "all"}}).endswith('give "all-linear", or a list of module names')


def test_what_only_follows_from_another_error_is_not_told() -> None:
    assert "clients: " not in refusal({"clients": [{"name": "A B"}]})


def test_both_forms_of_wait_and_of_targets_are_taken() -> None:
    values = {"model": {"path": "m"}, "clients": [{"name": "a"}]}
    plan = parse_plan(values | {"training": {"wait": 2}, "adapter": {"targets": ["q_proj"]}})
    assert (plan.training.wait, plan.adapter.targets) == (2.0, ("q_proj",))
    plan = parse_plan(values | {"training": {"wait": "all"}, "adapter": {"targets": "all-linear"}})
    assert (plan.training.wait, plan.adapter.targets) == ("all", "all-linear")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[limit]\nmax_input_blocks = 2\n", "did you mean `limits`?"),
        ("max_input_blocks = 2\n", "`max_input_blocks` belongs to the table [limits]"),
        ("[limits]\nmax_input_block = 2\n", "did you mean `max_input_blocks`?"),
        ("[server]\n", "known here: limits"),
    ],
)
def test_a_client_s_limits_are_never_silently_ignored(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "client.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_limits(path)
    assert says in str(refused.value)


def test_limits_are_read_from_their_table(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text(toml({"limits": {"max_input_blocks": 2}}))
    assert load_limits(path).max_input_blocks == 2
    path.write_text("")
    assert load_limits(path).max_input_blocks == 1024


def test_a_folder_in_place_of_a_plan_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        load_plan(tmp_path)
