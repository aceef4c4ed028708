"""The key of a mapping: in a file of its owner alone, or from a passphrase."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedsea.errors import ConfigError
from fedsea.storage import storage_error, sync_folder

PASSPHRASE_VARIABLE = "FEDSEA_PSEUDONYMS_PASSPHRASE"  # noqa: S105 (the name of a variable)

_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}
"""64 MB and a fifth of a second for each guess."""
_MOST_SCRYPT = {"n": 1 << 20, "r": 16, "p": 8}


class KeySource(Protocol):
    """Where the key of a mapping comes from.

    Attributes:
        advice: What to do when it is not the right one.
    """

    advice: str

    def make(self, mapping: Path) -> tuple[bytes, dict[str, Any]]:
        """The key of a new mapping, and what its file is to say about it."""
        ...

    def find(self, mapping: Path, how: Mapping[str, Any]) -> bytes:
        """The key of a mapping whose file says `how`."""
        ...

    def settle(self) -> None:
        """The mapping is on disk: from now on a key without it means that it was lost."""
        ...


_NEW = "new "
"""Stands before a key until its mapping is on disk: a process that ends in between leaves nothing that was used."""


class KeyFile:
    """32 random bytes in a file that only its owner can read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.advice = f"put the key that belongs to it back to {path}, or its backup's."

    def make(self, mapping: Path) -> tuple[bytes, dict[str, Any]]:
        """Make the file, or take the one of a process that ended before it had written a mapping.

        Raises:
            ConfigError: The key had a mapping, which must have been lost.
            StorageError: The disk refuses.
        """
        try:
            if self.path.exists() and not os.access(self.path, os.W_OK):  # finished, and put under lock by its owner
                raise self._without(mapping)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # two mappings may be begun with one key
                key = self._made(descriptor, mapping)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("write", self.path, error) from None
        sync_folder(self.path.parent)
        return key, {"kind": "file"}

    def _made(self, descriptor: int, mapping: Path) -> bytes:
        held = os.read(descriptor, 200).decode(errors="replace")
        if not (held.startswith(_NEW) or _NEW.startswith(held)):
            raise self._without(mapping)
        if held.endswith("\n") and (begun := _key_of(held)):
            return begun
        key = os.urandom(32)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 0)
        line = f"{_NEW}{key.hex()}\n".encode()
        if os.pwrite(descriptor, line, 0) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        return key

    def _without(self, mapping: Path) -> ConfigError:
        return ConfigError(
            f"There is a key {self.path}, but no mapping {mapping}: restore the mapping from a backup, or, to "
            "begin one with other surrogates, move the key away."
        )

    def settle(self) -> None:
        """Strike out that it is new.

        Raises:
            StorageError: The disk refuses.
        """
        try:
            if not self.path.read_bytes().startswith(_NEW.encode()):
                return  # and may be under lock by now
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error("open", self.path, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.pread(descriptor, len(_NEW), 0) == _NEW.encode():  # in place: the file may be a link or a mount
                os.pwrite(descriptor, b" " * len(_NEW), 0)
                os.fsync(descriptor)
        except OSError as error:
            raise storage_error("write", self.path, error) from None
        finally:
            os.close(descriptor)

    def find(self, mapping: Path, how: Mapping[str, Any]) -> bytes:
        """Read the file.

        Raises:
            ConfigError: It is missing, open to others, or no key.
        """
        if how.get("kind") != "file":
            raise ConfigError(
                f"The mapping {mapping} was made with a passphrase: set passphrase = true in [pseudonyms]."
            )
        try:
            mode = self.path.stat().st_mode
            text = self.path.read_text(encoding="ascii")
        except FileNotFoundError:
            raise ConfigError(f"There is no key {self.path} for the mapping {mapping}: {self.advice}") from None
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"The key {self.path} cannot be read: {self.advice}") from None
        if mode & 0o077:
            raise ConfigError(f"The key {self.path} can be read by others: chmod 600 {self.path}")
        if not (key := _key_of(text)):
            raise ConfigError(f"{self.path} is no key of a mapping: {self.advice}")
        return key


def _key_of(text: str) -> bytes:
    """The key that a file holds, behind what is left of the mark of a new one; empty if it holds none."""
    held = text.rstrip()
    try:
        key = bytes.fromhex(held[len(_NEW) :] if len(held) == len(_NEW) + 64 else held)
    except ValueError:
        return b""
    return key if len(key) == 32 else b""


class Passphrase:
    """A key made of a passphrase by scrypt.

    Args:
        passphrase: Taken from FEDSEA_PSEUDONYMS_PASSPHRASE if not given.

    Raises:
        ConfigError: There is none, or it is too short.
    """

    advice = f"give the passphrase that it was made with in {PASSPHRASE_VARIABLE}."

    def __init__(self, passphrase: str | None = None) -> None:
        given = os.environ.get(PASSPHRASE_VARIABLE, "") if passphrase is None else passphrase
        if len(given) < 12:
            raise ConfigError(
                f"The mapping of pseudonyms is to be sealed with a passphrase: give one of at least 12 letters in "
                f"{PASSPHRASE_VARIABLE}."
            )
        self._passphrase = given.encode()

    def make(self, mapping: Path) -> tuple[bytes, dict[str, Any]]:  # noqa: ARG002 (the other source's)
        """The key for a new salt."""
        salt = os.urandom(16)
        return self._derive(salt, _SCRYPT), {"kind": "scrypt", "salt": salt.hex(), **_SCRYPT}

    def find(self, mapping: Path, how: Mapping[str, Any]) -> bytes:
        """The key for a mapping's salt.

        Raises:
            ConfigError: The mapping has a key file, or asks for more work than is sensible.
        """
        if how.get("kind") != "scrypt":
            raise ConfigError(
                f"The mapping {mapping} was made with a key file: set `passphrase = false` in [pseudonyms]."
            )
        try:
            cost = {name: int(how[name]) for name in _SCRYPT}
            salt = bytes.fromhex(how["salt"])
            if any(not 0 < cost[name] <= most for name, most in _MOST_SCRYPT.items()):
                raise ValueError
            return self._derive(salt, cost)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"The mapping {mapping} was altered: restore a backup of it.") from None

    def settle(self) -> None:
        """Nothing is kept of a passphrase."""

    def _derive(self, salt: bytes, cost: Mapping[str, int]) -> bytes:
        return Scrypt(salt=salt, length=32, **cost).derive(self._passphrase)
