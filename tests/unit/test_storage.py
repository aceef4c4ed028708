"""What `fedsea.storage` promises: whole files or none, and clear sentences when the disk refuses."""

import contextlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsea import storage
from fedsea.errors import ConfigError, StorageError


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "step": torch.tensor(7, dtype=torch.int64),
    }


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """Writing past `num_bytes` fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_and_state_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, some_tensors(), {"step": 3, "name": "é", "nested": [1, {"a": None}]})
    tensors, state = storage.load_tensors(path)
    assert state == {"step": 3, "name": "é", "nested": [1, {"a": None}]}
    assert tensors.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_a_loaded_tensor_can_change_without_changing_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, some_tensors(), {})
    storage.load_tensors(path)[0]["a"].zero_()
    assert torch.equal(storage.load_tensors(path)[0]["a"], some_tensors()["a"])


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_checkpoint_is_named_in_the_error(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, some_tensors(), {"step": 3})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match=r"x\.safetensors is truncated or damaged: restore a backup"):
        storage.load_tensors(path)


def test_a_changed_state_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, some_tensors(), {"step": 333})
    path.write_bytes(path.read_bytes().replace(b"333", b"334"))
    with pytest.raises(StorageError, match="damaged"):
        storage.load_tensors(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StorageError, match="not a checkpoint of fedsea"):
        storage.load_tensors(path)


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    monkeypatch.setattr(storage, "FORMAT_VERSION", "99")
    storage.save_tensors(path, some_tensors(), {})
    monkeypatch.undo()
    with pytest.raises(StorageError, match="format 99"):
        storage.load_tensors(path)


def test_a_missing_checkpoint_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="There is no checkpoint"):
        storage.load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: storage.write_bytes_atomic(path, bytes(100_000)),
        lambda path: storage.save_tensors(path, {"a": torch.zeros(100_000)}, {}),
    ],
    ids=["bytes", "tensors"],
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with largest_file(4096), pytest.raises(StorageError, match=r"Cannot write .*x\.safetensors: .* start again"):
        write(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="create it, or choose another"):
        storage.write_bytes_atomic(tmp_path / "none" / "x", b"")


def test_bytes_are_replaced_whole_and_readable_by_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes_atomic(path, b"one")
    storage.write_bytes_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_store_keeps_the_newest_and_finds_them(tmp_path: Path) -> None:
    with storage.CheckpointStore(tmp_path / "run", keep=2) as store:
        assert store.latest() is None
        for step in (0, 9, 10, 11):
            store.save(step, some_tensors(), {"step": step})
        assert store.steps() == [10, 11]
        step, tensors, state = store.latest()  # type: ignore[misc]
        assert (step, state) == (11, {"step": 11})
        assert torch.equal(tensors["a"], some_tensors()["a"])
        assert store.load(10)[1] == {"step": 10}
        assert store.path(10).name == "step-00000010.safetensors"


def test_a_damaged_newest_checkpoint_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    with storage.CheckpointStore(tmp_path) as store:
        store.save(1, some_tensors(), {})
        store.save(2, some_tensors(), {})
        store.path(2).write_bytes(b"")
        with pytest.raises(StorageError, match="step-00000002"):
            store.latest()


def test_a_checkpoint_that_was_pruned_while_it_was_looked_for_is_no_error(tmp_path: Path) -> None:
    with storage.CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, some_tensors(), {"step": 1})

        class Overtaken(storage.CheckpointStore):
            def load(self, step: int):
                if step == 1:
                    store.save(2, some_tensors(), {"step": 2})
                return super().load(step)

        assert Overtaken(tmp_path, read_only=True).latest()[::2] == (2, {"step": 2})


def test_a_removed_file_is_gone_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(storage, "_sync", lambda path, _flags: synced.append((path, os.listdir(path))))
    (tmp_path / "x").touch()
    storage.remove_durably(tmp_path / "x")
    storage.remove_durably(tmp_path / "x")
    assert synced == [(tmp_path, [])] * 2


def test_opening_a_store_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.safetensors.abc.tmp").write_bytes(b"half")
    with storage.CheckpointStore(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedsea.storage import CheckpointStore\n"
        "try: CheckpointStore(Path(sys.argv[1])); print('opened')\n"
        "except Exception as error: print(error)"
    )

    def open_elsewhere() -> str:
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    with storage.CheckpointStore(tmp_path) as store:
        assert "in use by another process" in open_elsewhere()
        with storage.CheckpointStore(tmp_path, read_only=True) as reader:
            store.save(1, some_tensors(), {})
            assert reader.steps() == [1]
    assert open_elsewhere() == "opened\n"


def test_a_store_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep"):
        storage.CheckpointStore(tmp_path, keep=0)


def test_importing_storage_does_not_import_torch() -> None:
    program = "import fedsea.storage, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_run_folder_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    with storage.CheckpointStore(tmp_path / "none", read_only=True) as store:
        assert store.latest() is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_in_the_place_of_the_folder_says_what_to_do(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another folder"):
        storage.CheckpointStore(tmp_path / "file" / "run", read_only=read_only).steps()


def test_a_folder_in_the_place_of_a_checkpoint_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=str(tmp_path)):
        storage.load_tensors(tmp_path)
