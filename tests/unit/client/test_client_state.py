"""A client's run folder: what comes back, and what is refused."""

from __future__ import annotations

import errno
import threading
from dataclasses import asdict

import pytest
import torch

from fedsea import storage
from fedsea.client.run_key import ALONE, RunKey
from fedsea.client.state import ClientState, ClientStore, DataNote, Prepared
from fedsea.client.trunk import Standing
from fedsea.data.formats import DataFormat
from fedsea.errors import ConfigError, DataError, StorageError
from fedsea.plan import parse_plan

PLAN = parse_plan({"model": {"path": "m"}, "clients": [{"name": "a"}]})
TENSORS = {"parameter.x": torch.arange(4.0)}


def prepared(step: int, updates: int = 0) -> Prepared:
    return Prepared(step, 12, 3.5, 1.25, {"row": 4}, {"x": torch.full((2,), 7.0)}, updates)


@pytest.fixture
def store(tmp_path):
    made = ClientStore(tmp_path / "run", PLAN, "run-1")
    yield made
    made.close()


def reopened(store: ClientStore, plan=PLAN, run_id: str = "run-1") -> ClientStore:
    store.close()
    return ClientStore(store.folder, plan, run_id)


def test_a_new_folder_holds_nothing(store):
    assert store.restore() is None
    assert store.standing == Standing(0, -1, 0)


def test_state_and_tensors_come_back(store):
    state = ClientState(3, 2, 1, 99, {"row": 4, "sequence": 1})
    store.save(state, TENSORS)
    again = reopened(store)
    assert torch.equal(again.restore()["parameter.x"], TENSORS["parameter.x"])
    assert again.state == state
    assert again.standing == Standing(3, -1, 1)
    again.close()


def test_a_prepared_step_comes_back(store):
    store.save(ClientState(next_step=3), TENSORS)
    store.prepare(prepared(3))
    assert store.standing == Standing(3, 3, 0)
    again = reopened(store)
    again.restore()
    found = again.prepared
    assert again.standing == Standing(3, 3, 0)
    assert (found.num_target_tokens, found.squared_norm, found.mean_loss, found.data) == (12, 3.5, 1.25, {"row": 4})
    assert torch.equal(found.gradients["x"], torch.full((2,), 7.0))
    again.close()


def test_a_prepared_step_that_was_applied_is_forgotten(store):
    store.prepare(prepared(3))
    store.save(ClientState(next_step=4), TENSORS)
    assert store.prepared is None
    again = reopened(store)
    again.restore()
    assert again.standing == Standing(4, -1, 0)
    again.close()


def test_a_prepared_step_whose_checkpoint_is_missing_is_refused(store):
    store.save(ClientState(next_step=3, updates=3), TENSORS)
    store.save(ClientState(next_step=4, updates=4), TENSORS)
    store.prepare(prepared(4, updates=4))
    (store.folder / "checkpoints" / "step-00000004.safetensors").unlink()
    again = reopened(store)
    with pytest.raises(StorageError, match=r"contains 3 steps of this client, .* after 4: .* Restore a backup"):
        again.restore()
    assert again.prepared is None
    again.close()


@pytest.mark.parametrize("updates", [2, -1])
def test_a_prepared_step_comes_back_although_others_stepped_before_it(store, updates):
    store.save(ClientState(next_step=3, updates=2), TENSORS)
    store.prepare(prepared(7, updates=updates))
    path = store.folder / "prepared.safetensors"
    if updates == -1:  # a file of a version that did not note it
        tensors, item = storage.load_tensors(path)
        del item["updates"]
        storage.save_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, item)
    again = reopened(store)
    again.restore()
    assert again.standing == Standing(3, 7, 0)
    again.close()


def test_a_discarded_step_does_not_come_back(store):
    store.save(ClientState(next_step=3), TENSORS)
    store.prepare(prepared(3))
    store.discard_prepared()
    again = reopened(store)
    again.restore()
    assert again.prepared is None
    again.close()


def test_another_plan_is_refused_field_by_field(store):
    store.save(ClientState(), TENSORS)
    again = reopened(store, PLAN.model_copy(update={"seed": 3}))
    with pytest.raises(ConfigError, match="seed: 3 here, 0 there"):
        again.restore()
    again.close()


def test_another_run_of_the_server_is_refused(store):
    store.save(ClientState(), TENSORS)
    again = reopened(store, run_id="run-2")
    with pytest.raises(ConfigError, match="another run of the server"):
        again.restore()
    again.close()


def test_what_a_killed_process_left_half_written_is_removed(store):
    leftovers = [store.folder / name for name in (".prepared.safetensors.x1.tmp", ".summary.json.x2.tmp")]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    store.close()
    ClientStore(store.folder, PLAN, "run-1").close()
    assert not any(leftover.exists() for leftover in leftovers)


def test_two_processes_cannot_use_one_folder(store):
    with pytest.raises(ConfigError, match="in use by another process"):
        ClientStore(store.folder, PLAN, "run-1")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def test_a_full_disk_leaves_checkpoint_and_prepared_step_as_they_were(store, monkeypatch):
    store.save(ClientState(next_step=1), TENSORS)
    store.prepare(prepared(1))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_sync", full_disk)
        store.save(ClientState(next_step=2), TENSORS)
        with pytest.raises(StorageError, match="disk is full"):
            store.flush()
        with pytest.raises(StorageError, match="disk is full"):
            store.prepare(prepared(2))
    names = {path.name for path in store.folder.rglob("*") if path.is_file()}
    assert names == {".lock", "step-00000001.safetensors", "prepared.safetensors"}
    again = reopened(store)
    again.restore()
    assert again.standing == Standing(1, 1, 0)
    again.close()


def test_the_next_step_is_not_prepared_before_the_last_one_is_durable(store, monkeypatch):
    order = []
    written, go_on = storage.save_tensors, threading.Event()

    def slow(path, tensors, state):
        if path.name.startswith("step-"):
            assert go_on.wait(10)
        written(path, tensors, state)
        order.append(path.name)

    monkeypatch.setattr(storage, "save_tensors", slow)
    monkeypatch.setattr("fedsea.client.state.save_tensors", slow)
    store.save(ClientState(next_step=1), TENSORS)
    assert order == []
    threading.Timer(0.05, go_on.set).start()
    store.prepare(prepared(1))
    assert order == ["step-00000001.safetensors", "prepared.safetensors"]


def test_a_damaged_prepared_step_is_an_error_not_a_loss(store):
    store.save(ClientState(next_step=1), TENSORS)
    store.prepare(prepared(1))
    path = store.folder / "prepared.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    again = reopened(store)
    with pytest.raises(StorageError, match="truncated or damaged"):
        again.restore()
    again.close()


def test_the_newest_checkpoint_can_be_looked_at_while_a_client_runs(store):
    assert ClientStore.peek(store.folder) is None
    store.save(ClientState(), TENSORS)
    store.flush()
    assert ClientStore.peek(store.folder).keys() == TENSORS.keys()


# --- whose run it is ----------------------------------------------------------------------------------------------


def test_another_clients_folder_is_refused_for_training(tmp_path):
    first = ClientStore(tmp_path, PLAN, "run-1", "a")
    first.save(ClientState(), TENSORS)
    first.close()
    other = ClientStore(tmp_path, PLAN, "run-1", "b")
    with pytest.raises(ConfigError, match="that of client a, and this is b"):
        other.restore()
    other.close()


def with_data(folder, note: DataNote) -> ClientStore:
    return ClientStore(folder, PLAN, "run-1", "a", DataFormat(), note)


def test_a_run_that_was_started_with_files_of_other_content_is_refused_from_its_first_checkpoint_on(tmp_path):
    first = with_data(tmp_path, DataNote("sha-1", 9))
    first.save(ClientState(), TENSORS)
    first.close()
    assert ClientStore.data_of(tmp_path) == DataNote("sha-1", 9)
    changed = with_data(tmp_path, DataNote("sha-2", 9))
    with pytest.raises(DataError, match=r"other data files.*before they were changed.*put the files .* back"):
        changed.check()
    changed.close()
    same = with_data(tmp_path, DataNote("sha-1", 9))
    same.check()
    same.close()


def test_a_run_of_a_version_that_noted_no_content_goes_on_and_notes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsea.client.state.asdict", lambda item: {} if isinstance(item, DataNote) else asdict(item))
    before = with_data(tmp_path, DataNote("sha-1", 9))
    before.save(ClientState(), TENSORS)
    before.close()
    monkeypatch.undo()
    assert ClientStore.data_of(tmp_path) == DataNote()
    now = with_data(tmp_path, DataNote("sha-1", 9))
    now.restore()
    now.save(ClientState(next_step=1), TENSORS)
    now.close()
    assert ClientStore.data_of(tmp_path) == DataNote("sha-1", 9)


def test_a_look_gives_state_and_tensors_of_the_run_that_is_meant(store):
    assert ClientStore.look(store.folder, store.key) is None
    store.save(ClientState(next_step=3), TENSORS)
    store.flush()
    state, tensors = ClientStore.look(store.folder, RunKey(PLAN, "run-1", "a"))
    assert state.next_step == 3
    assert tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (RunKey(PLAN.model_copy(update={"seed": 3}), "run-1"), "seed: 3 here, 0 there"),
        (RunKey(PLAN, "run-2"), "another run of the server"),
        (RunKey(PLAN, ALONE), "trained with a server"),
    ],
    ids=["plan", "run", "alone"],
)
def test_a_look_at_another_runs_folder_says_what_differs_and_what_to_give(store, key, says):
    store.save(ClientState(), TENSORS)
    store.flush()
    with pytest.raises(ConfigError, match=f"{says}.*Give --run the folder"):
        ClientStore.look(store.folder, key)


def test_a_look_at_a_run_without_a_server_says_so(tmp_path):
    alone = ClientStore(tmp_path, PLAN, ALONE, "a")
    alone.save(ClientState(), TENSORS)
    alone.close()
    with pytest.raises(ConfigError, match="train --alone"):
        ClientStore.look(tmp_path, RunKey(PLAN, "run-1", "a"))


def test_a_look_at_a_servers_folder_says_that_it_is_none_of_a_client(tmp_path):
    with storage.CheckpointStore(tmp_path / "checkpoints") as servers:
        servers.save(1, TENSORS, {"run_id": "run-1", "next_step": 1})
    with pytest.raises(ConfigError, match="no run folder of a client"):
        ClientStore.look(tmp_path, RunKey(PLAN, "run-1"))


def test_the_end_of_a_run_comes_back(store):
    assert ClientStore.ended(store.folder) is None
    store.save(ClientState(next_step=4, rounds_done=2), TENSORS)
    store.finish({"loss": 1.5})
    ended = ClientStore.ended(store.folder)
    assert (ended.standing, ended.summary) == (Standing(4, -1, 2), {"loss": 1.5})
    assert ended.belongs_to(store.key)
    assert not ended.belongs_to(RunKey(PLAN, "run-2"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"next_step": 1, "rounds_done": 0, "more": 2}'])
def test_a_note_of_the_end_that_cannot_be_read_counts_for_nothing(store, text):
    (store.folder / "summary.json").write_text(text)
    assert ClientStore.ended(store.folder) is None
