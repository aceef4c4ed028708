"""Which ledger a run is charged to, when the identity's folder is another one by now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedsea.client.accounts import POINTER, find_ledgers, open_boundary, reports
from fedsea.client.run_key import ALONE
from fedsea.errors import ConfigError, StorageError
from fedsea.plan import NoiseSection
from fedsea.privacy.book import ANCHOR, FILE, Book
from fedsea.types import Origin, Purpose
from tests.unit.privacy.plans import noised

PLAN = noised(clients=[{"name": "a"}, {"name": "b"}])


def release(identity: Path, run: Path, *, own_run: bool = True, name: str = "a", run_id: str = "r") -> None:
    with open_boundary(PLAN, name, run_id, identity=identity, run=run, settings=None, own_run=own_run) as boundary:
        boundary.hidden(torch.ones(2, 4), Origin(Purpose.TRAINING, (2,)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    release(tmp_path / "old", folder)
    return folder


@pytest.mark.parametrize("own_run", [True, False])
def test_a_run_goes_on_with_the_ledger_that_it_was_charged_to_or_not_at_all(tmp_path, run, own_run):
    new = tmp_path / "new"
    with pytest.raises(StorageError, match="missing or another: nothing was sent"):
        release(new, run, own_run=own_run)
    assert not find_ledgers(new)
    (old,) = find_ledgers(tmp_path / "old")
    shutil.copytree(old, new / "ledger" / old.name)
    release(new, run, own_run=own_run)
    assert Book.open(find_ledgers(new)[0]).spent.total == pytest.approx(2 * Book.open(old).spent.total)


def test_a_ledger_that_was_removed_does_not_begin_again(tmp_path, run):
    (old,) = find_ledgers(tmp_path / "old")
    for name in (FILE, ANCHOR):
        (old / name).unlink()
    with pytest.raises(StorageError, match="charged to the privacy ledger in"):
        release(tmp_path / "old", run)


def test_another_ledger_of_the_same_client_and_plan_does_not_stand_in(tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    release(tmp_path / "new", other)
    with pytest.raises(StorageError, match="another ledger, or an old copy"):
        release(tmp_path / "new", run)
    assert Book.open(find_ledgers(tmp_path / "new")[0]).spent.total == Book.open(find_ledgers(run)[0]).spent.total


def test_a_run_of_another_client_says_nothing_and_one_that_cannot_be_read_stops(tmp_path, run):
    release(tmp_path / "new", run, name="b", own_run=False)
    (run / POINTER).write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        release(tmp_path / "old", run)


def test_an_old_copy_of_the_whole_ledger_is_refused_by_a_run_that_was_charged_since(tmp_path, run):
    identity = tmp_path / "old"
    shutil.copytree(identity, tmp_path / "backup")
    release(identity, run, own_run=False)
    shutil.rmtree(identity)
    shutil.copytree(tmp_path / "backup", identity)
    for again in (lambda: release(identity, run), lambda: reports(run)):
        with pytest.raises(StorageError, match="an old copy was put back"):
            again()


def test_a_ledger_that_went_on_without_a_run_is_no_old_copy(tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    release(tmp_path / "old", other, run_id="s")
    release(tmp_path / "old", run)
    assert len(reports(run)) == 1


STRICT = "hidden_std = 8.0\nepsilon = 1.5\n"


def charged_with(folder: Path, noise: str | None, run_id: str = "r") -> NoiseSection:
    """What a release was clipped to and noised with, under settings that say so, or without any."""
    settings = None if noise is None else folder / "client.toml"
    if settings is not None:
        settings.write_text(f"[noise]\n{noise}")
    run = folder / "run"
    run.mkdir(exist_ok=True)
    with open_boundary(
        PLAN, "a", run_id, identity=folder / "id", run=run, settings=settings, own_run=False
    ) as boundary:
        boundary.hidden(torch.ones(2, 4), Origin(Purpose.TRAINING, (2,), ("document",), (0,)))
        assert boundary.noise is not None
        return boundary.noise


@pytest.mark.parametrize("run_id", ["r", "another", ALONE])
@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "hidden_std was 8 and would be the plan's 4; noise.epsilon was 1.5 and would be the plan's 0 .none"),
        ("", "hidden_std was 8.*epsilon was 1.5"),
        ("hidden_std = 9.0\n", "settings: noise.epsilon was 1.5"),
        ("epsilon = 1.0\n", "settings: noise.hidden_std was 8"),
    ],
)
def test_a_clients_own_noise_and_budget_are_not_dropped_by_a_command_that_leaves_them_out(tmp_path, run_id, left, said):
    charged_with(tmp_path, STRICT, ALONE if run_id == ALONE else "r")
    (ledger,) = find_ledgers(tmp_path / ("run" if run_id == ALONE else "id"))
    before = (ledger / FILE).read_bytes()
    with pytest.raises(ConfigError, match=f"{said}.*Nothing was sent. Give the settings file"):
        charged_with(tmp_path, left, run_id)
    assert (ledger / FILE).read_bytes() == before
    assert charged_with(tmp_path, STRICT, run_id).hidden_std == 8.0


def test_a_tighter_clip_is_not_dropped_either(tmp_path):
    charged_with(tmp_path, "gradient_clip = 0.5\n")
    with pytest.raises(ConfigError, match=r"gradient_clip was 0.5 and would be the plan's 1"):
        charged_with(tmp_path, None)


def test_settings_that_name_laxer_values_are_a_decision_and_what_comes_after_is_held_to_them(tmp_path):
    charged_with(tmp_path, STRICT)
    assert charged_with(tmp_path, "hidden_std = 5.0\nepsilon = 40.0\n").epsilon == 40.0
    with pytest.raises(ConfigError, match=r"hidden_std was 5 .*epsilon was 40"):
        charged_with(tmp_path, None)
    charged_with(tmp_path, "hidden_std = 4.0\nepsilon = 40.0\n")
    with pytest.raises(ConfigError, match=r"settings: noise.epsilon was 40"):
        charged_with(tmp_path, None)


def test_a_ledger_without_noise_of_the_clients_own_asks_for_no_settings_and_may_become_stricter(tmp_path):
    for noise, std in (
        (None, 4.0),
        (None, 4.0),
        ("hidden_std = 8.0\nepsilon = 9.0\n", 8.0),
        ("hidden_std = 9.0\nepsilon = 8.0\n", 9.0),
    ):
        assert charged_with(tmp_path, noise).hidden_std == std
