"""What a wrong key in a plan or in a client's settings is told."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from fedsea.errors import ConfigError
from fedsea.plan import (
    ClientEntry,
    ClientSettings,
    FederationPlan,
    load_limits,
    load_plan,
    parse_plan,
    parse_plan_json,
)
from fedsea.plan.loading import _explain
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


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"training": {"rounds": 0}}, "training.rounds: 0 is too small; give at least 1"),
        ({"training": {"rounds": 2.5}}, "training.rounds: 2.5 is no whole number; give one"),
        ({"training": {"rounds": "many"}}, 'training.rounds: "many" is no whole number; give one'),
        ({"training": {"mode": "batch"}}, 'mode: "batch" is not among the choices; give "sequential" or "batched"'),
        ({"optimizer": {"learning_rate": -1}}, "learning_rate: -1 is too small; give more than 0"),
        ({"optimizer": {"eps": [1]}}, "optimizer.eps: this is no number; give one"),
        ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "optimizer.betas: this has 3 entries; give at most 2"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas: 0.9 is no list; give one, in brackets"),
        ({"adapter": {"dropout": 1.5}}, "adapter.dropout: 1.5 is too large; give less than 1"),
        ({"inference": {"max_sequences": 5000}}, "max_sequences: 5000 is too large; give at most 4096"),
        ({"seed": 2**31}, "seed: 2147483648 is too large; give less than 2147483648"),
        ({"noise": {"hidden_std": float("inf")}}, "noise.hidden_std: inf is no finite number; give one"),
        ({"wire": {"sealed": "perhaps"}}, 'wire.sealed: "perhaps" is neither true nor false; give one of the two'),
        ({"model": {"path": 3}}, "model.path: 3 is no text; give one, in quotes"),
        ({"wire": "fp16"}, 'wire: "fp16" is no table; give keys with values'),
        ({"clients": []}, "clients: this has 0 entries; give at least 1"),
        ({"training": {"rounds": 1.0}}, "training.rounds: 1.0 is no whole number; give one"),
        ({"training": {"rounds": True}}, "training.rounds: true is no whole number; give one"),
        ({"training": {"rounds": "1"}}, 'training.rounds: "1" is no whole number; give one'),
        ({"optimizer": {"learning_rate": "0.1"}}, 'optimizer.learning_rate: "0.1" is no number; give one'),
        ({"optimizer": {"learning_rate": 10**400}}, "learning_rate: this number is too large; give a smaller one"),
        ({"optimizer": {"betas": [True, 0.9]}}, "optimizer.betas.0: true is no number; give one"),
        ({"wire": {"sealed": 1}}, "wire.sealed: 1 is neither true nor false; give one of the two"),
        ({"adapter": {"rank": 10**23}}, "adapter.rank: this number is too large; give at most 65536"),
        ({"clients": [{"name": "a", "micro_batches": 10**20}]}, "clients.0.micro_batches: this number is too large; "),
        ({"training": {"mode": "\x1b[2J" + "x" * 99}}, 'mode: "\\u001b[2J' + "x" * 36 + "\\u2026" + '" is not'),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(values: dict[str, Any], says: str) -> None:
    assert says in refusal(values)


def holds(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(holds(part, kind) for part in get_args(annotation))


def keys_of(kind: type) -> list[tuple[str, str]]:
    """Table and key of everything in a plan that is of this type."""
    tables = {name: field.annotation for name, field in FederationPlan.model_fields.items()} | {"clients": ClientEntry}
    found = [
        (name, key)
        for name, table in tables.items()
        for key, field in getattr(table, "model_fields", {}).items()
        if holds(field.annotation, kind)
    ]
    assert found
    return found


def with_value(table: str, key: str, value: Any) -> dict[str, Any]:
    if table == "clients":
        return {"clients": [{"name": "a", key: value}]}
    return {table: {key: [value, value] if key == "betas" else value}}


@pytest.mark.parametrize(("table", "key"), keys_of(float))
def test_every_number_of_a_plan_is_a_finite_number(table: str, key: str) -> None:
    for wrong in (float("inf"), float("-inf"), float("nan"), 10**400, True, "0.5"):
        assert f"{table}.{key}" in refusal(with_value(table, key, wrong)), wrong


@pytest.mark.parametrize(("table", "key"), keys_of(int))
def test_every_count_of_a_plan_is_a_whole_number_with_a_bound(table: str, key: str) -> None:
    for wrong in (10**10, 10**23, 10**400, -1, True, "2", 2.0, float("inf")):
        said = refusal(with_value(table, key, wrong))
        assert re.search(rf"{table}\.(0\.)?{key}: ", said), said


@pytest.mark.parametrize(("table", "key"), keys_of(bool))
def test_every_switch_of_a_plan_is_true_or_false(table: str, key: str) -> None:
    for wrong in (0, 1, "yes", "true", 1.0):
        assert f"{table}.{key}: " in refusal(with_value(table, key, wrong)), wrong


def test_whole_numbers_stand_for_numbers() -> None:
    plan = parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}], "adapter": {"alpha": 8, "dropout": 0}})
    assert (plan.adapter.alpha, plan.adapter.dropout) == (8.0, 0.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"seed = {'9' * 5000}", "holds a number of thousands of digits: give a shorter one."),
        (f"seed = {'[' * 3000}{']' * 3000}", "nests its brackets too deeply"),
    ],
)
@pytest.mark.parametrize("load", [load_plan, load_limits])
def test_toml_that_python_cannot_read_is_one_sentence(tmp_path: Path, load: Any, text: str, says: str) -> None:
    path = tmp_path / "file.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_a_server_s_plan_that_python_cannot_read_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="plan is not JSON"):
        parse_plan_json(text)


@pytest.mark.parametrize("wrong", ["xx", "", -1, 1e300, float("nan"), True, None, [], [[]], {}, {"x": 1}], ids=repr)
@pytest.mark.parametrize("kind", [FederationPlan, ClientSettings])
def test_no_value_of_any_key_is_told_in_pydantic_s_words(kind: type[BaseModel], wrong: Any) -> None:
    tables = {name: field.annotation for name, field in kind.model_fields.items()}
    found = [(name, wrong) for name in tables]
    for name, table in tables.items():
        found += [(name, {key: wrong}) for key in getattr(table, "model_fields", {})]
    said = []
    for name, value in found:
        try:
            kind.model_validate({"model": {"path": "m"}, "clients": [{"name": "a"}]} | {name: value})
        except ValidationError as error:
            said.append(str(_explain(error, "It", kind)))
    assert said
    assert not [sentence for sentence in said if re.search(r"should|valid |Input|instance", sentence)]


def test_identifiers_of_a_client_are_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text('[pseudonyms]\nwords = "Mathilde"\npatterns = {"Mathilde B" = "x+"}\nkeep = ["M"]\n')
    with pytest.raises(ConfigError) as refused:
        load_limits(path)
    assert "pseudonyms.words: this is no list" in str(refused.value)
    assert "pseudonyms.keep.0: this text is too short; give at least 2 characters" in str(refused.value)
    assert "pseudonyms.patterns.Mathilde B: is no name for a key here" in str(refused.value)


@pytest.mark.parametrize("wait", ["al", "2", 0, -1.5, [3], True, float("inf"), float("nan"), 1e9, 10**400])
def test_a_wrong_wait_is_one_sentence(wait: Any) -> None:
    assert refusal({"training": {"wait": wait}}) == (
        'The plan is not usable: training.wait: give "all", or a number of seconds above 0 and at most 10000000'
    )


@pytest.mark.parametrize("targets", ["all", [], [""], ["q_proj", ""], [3]])
def test_wrong_targets_are_one_sentence(targets: Any) -> None:
    assert refusal({"adapter": {"targets": targets}}) == (
        'The plan is not usable: adapter.targets: give "all-linear", or a list of one or more module names'
    )


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
