"""Files of an identity or authority folder: keys that only their owner reads, and one writer at a time."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from fedsea.errors import AuthError, ConfigError, StorageError
from fedsea.storage import FolderLock, storage_error, write_bytes_atomic

LOCK_TIMEOUT_S = 20.0
_LOCK_POLL_S = 0.01
_LARGEST_FILE_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into `StorageError`."""
    try:
        yield
    except OSError as error:
        raise storage_error(action, path, error) from None


def make_folder(folder: Path) -> None:
    """Create a folder that only its owner may enter; one that exists keeps its mode."""
    with disk_errors("create", folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes and threads; one that holds it is waited for.

    Raises:
        ConfigError: It was held by another for `LOCK_TIMEOUT_S`.
        StorageError: The folder cannot be written.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            lock = FolderLock(folder)
            break
        except ConfigError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        lock.close()


def read_file(path: Path, missing: str) -> bytes:
    """Read a small file.

    Args:
        path: The file.
        missing: What to do when there is no such file; ends the error's sentence.

    Raises:
        ConfigError: There is no such file.
        StorageError: It cannot be read, or is far too large to be what it should be.
    """
    with disk_errors("read", path):
        try:
            if path.stat().st_size > _LARGEST_FILE_BYTES:
                raise StorageError(f"{path} is too large to be a key, request or certificate: check the path.")
            return path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"There is no file {path}: {missing}") from None
        except IsADirectoryError:
            raise ConfigError(f"{path} is a folder: {missing}") from None


def read_private(path: Path, missing: str) -> bytes:
    """Read a key, and refuse one that others on this machine can read.

    Raises:
        AuthError: Group or others have any right to the file.
        ConfigError: There is no such file.
    """
    data = read_file(path, missing)
    with disk_errors("read", path):
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise AuthError(
            f"The private key {path} is open to other users of this machine (mode {mode:04o}): "
            f"run `chmod 600 {path}`, and replace the key if they are not to be trusted."
        )
    return data


def write_private(path: Path, data: bytes) -> None:
    """Replace a file as a whole, durably, readable by its owner alone from its first byte on."""
    write_bytes_atomic(path, data)  # goes through mkstemp, whose files have mode 0600


def write_public(path: Path, data: bytes) -> None:
    """Replace a file that others may read, such as a certificate, as a whole and durably."""
    write_bytes_atomic(path, data)
    with disk_errors("write", path):
        path.chmod(0o644)


def rename(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`, durably."""
    with disk_errors("write", target):
        source.replace(target)
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were created or renamed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
