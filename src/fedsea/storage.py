"""Durable state: files that are either the old one or the whole new one, never a part.

A checkpoint is one safetensors file: tensors, and a small JSON state in the file's metadata. torch is imported
only where tensors are touched, so that the commands that merely look at a run folder start at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedsea.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "1"
"""Version of the checkpoint format; another one is refused."""

_STEP_FILE = re.compile(r"step-(\d{8,})\.safetensors")

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space, then start again",
    errno.EDQUOT: "the disk quota is used up; free some space, then start again",
    errno.EFBIG: "the file would be larger than this machine allows; raise the limit (ulimit -f), then start again",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; choose a folder that this user may write, or change its permissions",
    errno.EPERM: "permission denied; choose a folder that this user may write, or change its permissions",
    errno.ENOENT: "the folder does not exist; create it, or choose another one",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a file is there; choose another folder",
    errno.EISDIR: "it is a folder; name a file",
}


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """An `OSError` as the sentence for the user.

    Args:
        action: What was tried, such as "write".
        path: File or folder that it was tried on.
        error: What the operating system said.
    """
    advice = _ADVICE.get(error.errno or 0) or f"{error.strerror or error}; check the disk, then start again"
    return StorageError(f"Cannot {action} {path}: {advice}.")


def check_new_folder(folder: Path, option: str = "") -> None:
    """Whether a folder can be made: it is not there, or is empty.

    Args:
        folder: Which one.
        option: What names it on the command line, such as "--out".

    Raises:
        ConfigError: It holds something already, or a file is in its place.
        StorageError: It cannot be read.
    """
    named = f" with {option}" if option else ""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file: choose another folder{named}.")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: remove it, or choose another folder{named}.")
    except OSError as error:
        raise storage_error("read", folder, error) from None


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what the body wrote there replaces `path` durably, or vanishes."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise storage_error("write", path, error) from None
    os.close(descriptor)  # the writer may put a new file in its place, so it is opened again by name
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary, os.O_RDONLY)
        temporary.replace(path)
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("write", path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, durably; after a crash it is the old file or the new one.

    Raises:
        StorageError: The disk is full, read-only, or not ours to write; the old file is untouched.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        StorageError: The disk refused.
    """
    try:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("write", folder, error) from None


def remove_durably(path: Path) -> None:
    """Remove the file at `path`, if it is there, so that no crash brings it back.

    Raises:
        StorageError: The disk refused.
    """
    try:
        path.unlink(missing_ok=True)
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("remove", path, error) from None


def write_safetensors_atomic(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Replace the file at `path` by a safetensors file, durably.

    Raises:
        StorageError: As `write_bytes_atomic`.
    """
    from safetensors import SafetensorError, TensorSpec, serialize_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # `safetensors.torch.save_file` goes through ctypes and numpy: four times as long for the small tensors of a step.
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in plain.items()
    }
    with _replacing(path) as temporary:
        try:
            serialize_file(specs, temporary, {"format": "pt", **metadata})
        except SafetensorError as error:
            raise _os_error(error) from None


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON state as one durable safetensors file.

    Args:
        path: File to replace; its folder exists.
        tensors: Name to tensor, on any device.
        state: Anything that `json` can write.

    Raises:
        StorageError: The disk refused; the old file is untouched.
    """
    text = json.dumps(state, sort_keys=True)
    metadata = {
        "fedsea.format": FORMAT_VERSION,
        "fedsea.state": text,
        "fedsea.state_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_safetensors_atomic(path, tensors, metadata)


def _os_error(error: Exception) -> OSError:
    """The operating system's error inside a safetensors one, which carries it as text only."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Returns:
        Tensors on the CPU (they map the file: copy before keeping them long), and the state.

    Raises:
        StorageError: The file is missing, truncated, damaged, foreign, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise StorageError(f"There is no checkpoint {path}; check the path of the run folder.") from None
    except SafetensorError:
        raise _damaged(path) from None
    except OSError as error:
        raise storage_error("read", path, error) from None
    version = metadata.get("fedsea.format")
    if version is None:
        raise StorageError(f"{path} is not a checkpoint of fedsea; give the path of a run folder.")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} has checkpoint format {version}, this fedsea reads {FORMAT_VERSION}: use the one that wrote it."
        )
    text = metadata.get("fedsea.state", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("fedsea.state_sha256"):
        raise _damaged(path)
    state: dict[str, Any] = json.loads(text)
    return tensors, state


def _damaged(path: Path) -> StorageError:
    return StorageError(
        f"{path} is truncated or damaged: restore a backup of its folder, or remove the file to go on from the "
        "checkpoint before it, which the next start refuses if that one is too old for the run."
    )


class FolderLock:
    """Holds a folder for this process alone until `close`; the system releases it when the process dies.

    Raises:
        ConfigError: Another process holds the folder.
        StorageError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error("use", folder, error) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"The folder {folder} is in use by another process; stop that one, or choose another folder."
            ) from None
        except OSError as error:
            self.close()
            raise storage_error("lock", folder, error) from None

    def close(self) -> None:
        """Release the folder; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CheckpointStore:
    """The newest `keep` checkpoints of a run, in files `step-00000042.safetensors` of one folder.

    Args:
        folder: Made if it is not there.
        keep: How many checkpoints stay.
        read_only: Only look: takes no lock (so a running process may hold the folder), and never writes.

    Raises:
        ConfigError: Another process uses the folder, or `keep` is below 1.
        StorageError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, keep: int = 2, *, read_only: bool = False) -> None:
        if keep < 1:
            raise ConfigError("At least one checkpoint must be kept: set keep to 1 or more.")
        self.folder = folder
        self.keep = keep
        self._lock = None if read_only else FolderLock(folder)
        if not read_only:
            for leftover in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        try:
            found = (_STEP_FILE.fullmatch(path.name) for path in self.folder.iterdir())
            return sorted(int(match[1]) for match in found if match)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("read", self.folder, error) from None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step` durably, then remove those that are no longer kept.

        Raises:
            StorageError: The disk refused; the checkpoints that were there still are.
        """
        assert self._lock is not None, "a read-only store was asked to save"
        save_tensors(self.path(step), tensors, state)
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def load(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and state of a step.

        Raises:
            StorageError: There is no such checkpoint, or it is damaged.
        """
        return load_tensors(self.path(step))

    def latest(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Step, tensors and state of the newest checkpoint; `None` if there is none.

        A damaged newest checkpoint is an error, not a reason to go back in silence: peers may already rely on it.

        Raises:
            StorageError: The newest checkpoint is damaged.
        """
        steps = self.steps()
        while steps:
            try:
                return (steps[-1], *self.load(steps[-1]))
            except StorageError:
                # Another process may have written newer ones, and removed this one, since it was listed.
                before, steps = steps[-1], self.steps()
                if not steps or steps[-1] <= before:
                    raise
        return None
