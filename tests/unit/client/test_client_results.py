"""Which trunk a client's segments may be exported with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsea.client.options import ClientOptions
from fedsea.client.results import PartsWatch, check_steps, rows_of
from fedsea.client.state import ClientState, ClientStore, DataNote
from fedsea.data.formats import DataFormat
from fedsea.data.opening import files_sha256
from fedsea.errors import ConfigError, DataError
from fedsea.plan import FederationPlan, parse_plan

RUN = Path("runs/a")


def plan(**sections: dict[str, object]) -> FederationPlan:
    """Two rounds of three steps (each client's, if they take turns)."""
    training = {"rounds": 2, "steps_per_round": 3, **sections.pop("training", {})}
    values = {"model": {"path": "m"}, "clients": [{"name": "a"}, {"name": "b"}], "training": training}
    return parse_plan({**values, **sections})


PERSONAL = {"aggregation": {"sync": "personal"}}
TURNS = {"training": {"mode": "sequential"}}


@pytest.mark.parametrize(
    ("sections", "next_step", "rounds_done", "trunk_step"),
    [
        ({}, 0, 0, 0),
        ({}, 2, 0, 2),
        ({}, 3, 1, 3),
        ({}, 6, 2, 6),
        ({}, 1, 2, 6),
        (PERSONAL, 6, 0, 6),
        (TURNS | PERSONAL, 3, 0, 6),
        (TURNS | PERSONAL, 9, 0, 12),
        (TURNS, 3, 0, 5),
        (TURNS, 9, 2, 12),
    ],
    ids=[
        "start",
        "in a round",
        "after a round",
        "end",
        "average taken over by a client that was away",
        "personal",
        "others' turn",
        "others' last turn",
        "others' turn in a round",
        "end of turns",
    ],
)
def test_what_was_trained_together_may_be_exported(sections, next_step, rounds_done, trunk_step):
    state = ClientState(next_step=next_step, rounds_done=rounds_done)
    check_steps(plan(**sections), "a", state, trunk_step, RUN, finished=False)


@pytest.mark.parametrize(
    ("sections", "next_step", "rounds_done", "trunk_step"),
    [({}, 1, 0, 2), ({}, 3, 0, 3), ({}, 5, 1, 6), (PERSONAL, 5, 0, 6), (TURNS, 2, 0, 5), (TURNS | PERSONAL, 6, 0, 12)],
    ids=["a step", "an average", "a step and an average", "a step of its own", "a turn's step", "a turn"],
)
def test_a_run_that_is_behind_the_trunk_is_told_to_go_on(sections, next_step, rounds_done, trunk_step):
    state = ClientState(next_step=next_step, rounds_done=rounds_done)
    with pytest.raises(ConfigError, match=r"run in runs/a is behind the server's trunk.*Start `fedsea train`"):
        check_steps(plan(**sections), "a", state, trunk_step, RUN, finished=False)


def test_a_trunk_that_is_behind_the_run_is_the_operators_to_mend():
    with pytest.raises(ConfigError, match=r"trunk is behind the run.*at step 3, the run at 5.*Ask the operator"):
        check_steps(plan(), "a", ClientState(next_step=5), 3, RUN, finished=False)


def test_steps_that_did_not_wait_for_a_client_do_not_keep_it_from_its_finished_run():
    bounded = plan(**PERSONAL, training={"wait": 1.0})
    check_steps(bounded, "a", ClientState(next_step=4), 6, RUN, finished=True)


def test_every_version_of_the_trunk_that_was_not_trained_with_the_run_is_said_once(caplog):
    watch = PartsWatch(plan(), "a", ClientState(next_step=3, rounds_done=1), RUN)
    for version in (3, 0, 0, 3, 6, 0, 6):
        watch(version)
    said = [record.getMessage() for record in caplog.records]
    assert ["step 0:" in text for text in said] == [True, False]
    assert "is at step 3 and the server's trunk that answers here at step 6: these parts were not trained" in said[1]


# --- whether rows were held out -----------------------------------------------------------------------------------


class OpenedSilo:
    """What is asked of a silo here."""

    def __init__(self, num_rows: int = 5, fingerprint: int = 7, rows: str = "rows") -> None:
        self.num_rows = num_rows
        self.index = SimpleNamespace(sha256=lambda: rows)
        self.fingerprint = lambda: fingerprint


@pytest.fixture
def files(tmp_path):
    paths = tmp_path / "2024.jsonl", tmp_path / "2025.jsonl"
    for path in paths:
        path.write_text(f'{{"text": "{path.stem}"}}\n')
    return paths


@pytest.fixture
def rows_evaluated(tmp_path, files):
    """Which rows of some files are evaluated after a training on `files`; keywords as for `OpenedSilo`."""

    def rows_evaluated(given, *, noted: bool = True, everything: bool = False, **silo: int) -> str:
        note = DataNote(files_sha256(files), 5, "rows") if noted else DataNote()
        store = ClientStore(tmp_path / "run", plan(), "run-1", "a", DataFormat(), note)
        state = ClientState(data={"data": 7})
        store.save(state, {})
        store.close()
        options = ClientOptions("", Path(), tuple(given), tmp_path / "run")
        return rows_of(options, state, OpenedSilo(**silo), everything=everything)

    return rows_evaluated


def test_held_out_rows_are_those_of_the_files_of_the_training(files, rows_evaluated):
    assert rows_evaluated(files) == "held_out"
    assert rows_evaluated(files, everything=True) == "all"
    assert rows_evaluated(files, noted=False) == "held_out"


@pytest.mark.parametrize(
    ("change", "silo"),
    [
        (lambda files: files[::-1], {}),
        (lambda files: files[1:], {}),
        (lambda files: files, {"num_rows": 4}),
        (lambda files: files, {"rows": "others"}),
        (lambda files: files, {"noted": False, "fingerprint": 8}),
    ],
    ids=["another order", "fewer", "read otherwise", "other rows are bad", "a run of an earlier version"],
)
def test_held_out_rows_of_other_files_are_refused_unless_all_are_wanted(files, rows_evaluated, change, silo):
    with pytest.raises(DataError, match=r"not the files .*in their order.*give those files, or --all"):
        rows_evaluated(change(files), **silo)
    assert rows_evaluated(change(files), everything=True, **silo) == "all_of_other_files"


def test_without_a_run_nothing_says_which_rows_were_held_out(files):
    options = ClientOptions("", Path(), files)
    assert rows_of(options, None, OpenedSilo(), everything=False) == "unchecked"
    assert rows_of(options, None, OpenedSilo(), everything=True) == "all"
