"""The server's run folder: what comes back, and what is refused."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedsea import storage
from fedsea.errors import ConfigError, StorageError
from fedsea.plan import FederationPlan, parse_plan
from fedsea.server import closing
from fedsea.server.engine import Outcome
from fedsea.server.state import RunState, ServerStore
from tests.unit.server.coordination import FakeEngine

PLAN = parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}, {"name": "b"}]})
NAME = "model.layers.0.x.lora_A.weight"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def changed(**update: object):
    return PLAN.model_copy(update=update)


def test_everything_comes_back(tmp_path, engine):
    with_gradients = Outcome(4, 9, 0.25, {NAME: torch.full((2, 2), 3.0)})
    state = RunState("run", 5, 1, {"a": with_gradients, "b": Outcome(3, 7, 1.0)}, {NAME: torch.ones(2, 2)})
    store = ServerStore(tmp_path, PLAN)
    store.save_round(engine, state)
    store.close()
    again = ServerStore(tmp_path, PLAN)
    restored = again.restore(engine)
    again.close()
    assert (restored.run_id, restored.next_step, restored.rounds_done) == ("run", 5, 1)
    assert (restored.outcomes["a"].step, restored.outcomes["b"].step) == (4, 3)
    assert (restored.outcomes["a"].num_target_tokens, restored.outcomes["a"].clip_coefficient) == (9, 0.25)
    assert torch.equal(restored.outcomes["a"].gradients[NAME], with_gradients.gradients[NAME])
    assert torch.equal(restored.result[NAME], torch.ones(2, 2))
    assert engine.calls == [("load", ("parameter.trunk",))]


def test_a_new_folder_holds_nothing(tmp_path, engine):
    store = ServerStore(tmp_path, PLAN)
    assert store.restore(engine) is None
    store.close()


def test_another_plan_is_refused_field_by_field(tmp_path, engine):
    store = ServerStore(tmp_path, PLAN)
    store.save(engine, RunState("run"))
    store.close()
    other = changed(seed=3, training=PLAN.training.model_copy(update={"rounds": 9}))
    again = ServerStore(tmp_path, other)
    with pytest.raises(ConfigError) as caught:
        again.restore(engine)
    again.close()
    assert "seed: 3 here, 0 there" in caught.value.message
    assert "training.rounds: 9 here, 1 there" in caught.value.message
    assert "training.mode" not in caught.value.message


def test_two_servers_cannot_use_one_folder(tmp_path):
    store = ServerStore(tmp_path, PLAN)
    with pytest.raises(ConfigError, match="in use by another process"):
        ServerStore(tmp_path, PLAN)
    store.close()


def test_a_full_disk_leaves_the_state_before(tmp_path, engine, monkeypatch):
    store = ServerStore(tmp_path, PLAN)
    store.save(engine, RunState("run", 1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_sync", full)
        with pytest.raises(StorageError, match="disk is full"):
            store.save(engine, RunState("run", 2))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {".lock", "step-00000001.safetensors"}
    assert store.restore(engine).next_step == 1
    store.close()


def test_the_last_rounds_parameters_can_be_looked_at_while_a_server_runs(tmp_path, engine):
    store = ServerStore(tmp_path, PLAN)
    store.save_round(engine, RunState("run", 5, 1, {}, {NAME: torch.ones(2, 2)}))
    found = ServerStore.peek(tmp_path, PLAN)
    store.close()
    assert found.keys() == {"trunk", NAME}


def in_the_middle_of_a_round(folder: Path, engine: FakeEngine, monkeypatch) -> FederationPlan:
    """A run after one round of two, and four steps of the next one."""
    plan = changed(training=PLAN.training.model_copy(update={"rounds": 2, "steps_per_round": 5}))
    store = ServerStore(folder, plan)
    store.save_round(engine, RunState("run", 5, 1, {}, {NAME: torch.ones(2, 2)}))
    monkeypatch.setattr(engine, "tensors", lambda: {"parameter.trunk": torch.full((1,), 9.0)})
    store.save(engine, RunState("run", 9, 1))
    store.close()
    return plan


def test_a_trunk_that_trained_on_is_not_put_together_with_the_last_round(tmp_path, engine, monkeypatch, caplog):
    caplog.set_level("INFO", "fedsea")
    found = ServerStore.peek(tmp_path, in_the_middle_of_a_round(tmp_path, engine, monkeypatch))
    assert (found.keys(), float(found["trunk"])) == ({"trunk", NAME}, 1.0)
    assert "as it was after step 5" in caplog.text


def test_a_round_that_an_older_version_kept_without_its_trunk_is_exported_at_its_end_only(
    tmp_path, engine, monkeypatch
):
    plan = in_the_middle_of_a_round(tmp_path, engine, monkeypatch)
    (tmp_path / "trunks" / "step-00000001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"its trunk is at step 9, .* those of 1 complete rounds of 2"):
        ServerStore.peek(tmp_path, plan)
    (tmp_path / "checkpoints" / "step-00000009.safetensors").unlink()
    assert ServerStore.peek(tmp_path, plan).keys() == {"trunk", NAME}


@pytest.mark.parametrize("kept", ["_trunks", "_rounds", "_checkpoints"])
def test_a_round_that_is_not_durable_as_a_whole_has_not_ended(tmp_path, engine, monkeypatch, kept):
    store = ServerStore(tmp_path, PLAN)
    store.save_round(engine, RunState("run", 5, 1, {}, {NAME: torch.ones(2, 2)}))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(store, kept), "save", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_round(engine, RunState("run", 10, 2, {}, {NAME: torch.zeros(2, 2)}))
    found, restored = ServerStore.peek(tmp_path, PLAN), store.restore(engine)
    store.close()
    assert (restored.rounds_done, restored.next_step) == (1, 5)
    assert torch.equal(restored.result[NAME], torch.ones(2, 2))
    assert torch.equal(found[NAME], torch.ones(2, 2))


def test_a_trunk_of_rounds_without_a_sum_is_not_put_together_with_an_older_sum(tmp_path, engine, monkeypatch):
    store = ServerStore(tmp_path, PLAN)
    state = RunState("run", 5, 1, {}, {NAME: torch.ones(2, 2)})
    store.save_round(engine, state)
    monkeypatch.setattr(engine, "tensors", lambda: {"parameter.trunk": torch.full((1,), 9.0)})
    for number in (2, 3):
        state = closing.skip(SimpleNamespace(state=replace(state, next_step=5 * number), store=store, engine=engine))
    assert (state.rounds_done, state.skipped) == (3, 2)
    found, restored = ServerStore.peek(tmp_path, PLAN), store.restore(engine)
    store.close()
    assert (float(found["trunk"]), float(found[NAME].mean())) == (1.0, 1.0)
    assert (restored.skipped, restored.result.keys()) == (2, {NAME}), "the last sum is kept"


def test_a_frozen_trunk_leaves_the_aggregate_alone(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(engine, "tensors", dict)
    store = ServerStore(tmp_path, PLAN)
    store.save_round(engine, RunState("run", 5, 1, {}, {NAME: torch.ones(2, 2)}))
    assert ServerStore.peek(tmp_path, PLAN).keys() == {NAME}
    store.close()


def test_looking_before_the_first_round_says_so(tmp_path, engine):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        ServerStore.peek(tmp_path, PLAN)
    store = ServerStore(tmp_path, PLAN)
    store.save(engine, RunState("run", 1))
    store.close()
    with pytest.raises(ConfigError, match="No round is complete"):
        ServerStore.peek(tmp_path, PLAN)


def test_personal_parameters_are_not_at_the_server(tmp_path):
    personal = changed(aggregation=PLAN.aggregation.model_copy(update={"sync": "personal"}))
    with pytest.raises(ConfigError, match="at a client"):
        ServerStore.peek(tmp_path, personal)


def test_a_truncated_checkpoint_is_named(tmp_path: Path, engine):
    store = ServerStore(tmp_path, PLAN)
    store.save(engine, RunState("run", 1))
    path = tmp_path / "checkpoints" / "step-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StorageError, match=r"step-00000001\.safetensors is truncated or damaged"):
        store.restore(engine)
    store.close()
