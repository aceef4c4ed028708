"""The mapping on disk: which surrogate stands for what, sealed with AES-256-GCM under the client's key.

One file: a line that says how the key is made and whose mapping it is, then the sealed rest. It is written whole, by
replacing it, and always under a lock, so that training and a gateway may share it. Only whoever holds the key can read
it or change it unnoticed; that an older copy was put back cannot be noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedsea.errors import ConfigError, StorageError
from fedsea.privacy.pseudonyms.keys import KeySource
from fedsea.storage import storage_error, write_bytes_atomic

_MAGIC = b"fedsea pseudonyms 1\n"
_MOST_HEADER = 4096


@dataclass(slots=True)
class Entry:
    """One identifier and its surrogate.

    Attributes:
        kind: See `Span`.
        canonical: The identifier, however it was written.
        base: Its surrogate.
        surfaces: How it was written -> how the surrogate was written.
    """

    kind: str
    canonical: str
    base: str
    surfaces: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Contents:
    """What is sealed.

    Attributes:
        secret: 32 bytes from which surrogates are drawn.
        entries: In the order in which they were made.
    """

    secret: bytes
    entries: list[Entry]


class Vault:
    """The mapping file of one client.

    Args:
        path: The file; made, with a new secret, if neither it nor its key is there.
        key: Where its key comes from.
        owner: Name of the client, written into a new file and compared with that in an old one; "" leaves that out.
        wait_s: How long another process may hold the file.

    Raises:
        ConfigError: The key is missing or another one, or the file is another client's.
        StorageError: The file is truncated or was altered, or the disk refuses.
    """

    def __init__(self, path: Path, key: KeySource, owner: str = "", *, wait_s: float = 30.0) -> None:
        self.path = path
        self._source = key
        self._owner = owner
        self._wait_s = wait_s
        self._key = b""
        self._header: dict[str, Any] = {}
        self._stamp: tuple[int, int, int] | None = None

    def open(self) -> Contents:
        """Read the mapping, or begin one."""
        with self.locked():
            if not self.path.exists():
                return self._begin()
            return self._read()

    def changed(self) -> bool:
        """Whether another process has written the file since it was read or written here."""
        return _stamp(self.path) != self._stamp

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The file for this process alone.

        Raises:
            ConfigError: Another process has held it too long.
        """
        path = self.path.with_name(self.path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("use", path, error) from None
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        until = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ConfigError(
                        f"The mapping {self.path} has been in use by another process for {self._wait_s:g} s: "
                        "stop that one, or give this client a mapping of its own."
                    ) from None
                time.sleep(0.01)
            else:
                return

    def read(self) -> Contents:
        """What is in the file now; under `locked`."""
        return self._read()

    def write(self, contents: Contents) -> None:
        """Replace what is in the file; under `locked`.

        Raises:
            StorageError: The disk refused; the file is as it was.
        """
        entries = [[one.kind, one.canonical, one.base, one.surfaces] for one in contents.entries]
        body = json.dumps({"secret": contents.secret.hex(), "entries": entries}, ensure_ascii=False).encode()
        nonce = os.urandom(12)
        header = {**self._header, "nonce": nonce.hex(), "length": len(body) + 16}
        line = _MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n"
        write_bytes_atomic(self.path, line + AESGCM(self._key).encrypt(nonce, body, line))
        self._stamp = _stamp(self.path)

    def _begin(self) -> Contents:
        self._key, how = self._source.make(self.path)
        self._header = {"owner": self._owner, "key": how, "key_id": _key_id(self._key)}
        contents = Contents(os.urandom(32), [])
        self.write(contents)
        self._source.settle()
        return contents

    def _read(self) -> Contents:
        stamp = _stamp(self.path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise storage_error("read", self.path, error) from None
        line, header, sealed = self._parsed(data)
        owner = header["owner"]
        if self._owner and owner and owner != self._owner:
            raise ConfigError(
                f"The mapping {self.path} is that of client {owner}, and this is {self._owner}: "
                "give this client a mapping of its own ([pseudonyms] mapping)."
            )
        key = self._key or self._source.find(self.path, header["key"])
        if _key_id(key) != header["key_id"]:
            raise ConfigError(
                f"The mapping {self.path} was not made with this key: {self._source.advice} Nothing was changed."
            )
        try:
            body = json.loads(AESGCM(key).decrypt(bytes.fromhex(header["nonce"]), sealed, line))
        except InvalidTag:
            raise self._damaged("was altered") from None
        if not self._key:
            self._source.settle()
        self._key, self._header, self._stamp = key, header, stamp
        entries = [Entry(*values) for values in body["entries"]]
        return Contents(bytes.fromhex(body["secret"]), entries)

    def _parsed(self, data: bytes) -> tuple[bytes, dict[str, Any], bytes]:
        if not data.startswith(_MAGIC):
            if _MAGIC.startswith(data):
                raise self._damaged("is truncated")
            raise StorageError(f"{self.path} is no mapping of pseudonyms: check `mapping` in [pseudonyms].")
        end = data.find(b"\n", len(_MAGIC), _MOST_HEADER) + 1
        if not end:
            raise self._damaged("is truncated")
        try:
            header = json.loads(data[len(_MAGIC) : end])
            right = {"owner": str, "key": dict, "key_id": str, "nonce": str, "length": int}
            if not all(isinstance(header[name], kind) for name, kind in right.items()):
                raise ValueError
            bytes.fromhex(header["nonce"])
        except (ValueError, KeyError, TypeError):
            raise self._damaged("was altered") from None
        if len(data) - end < header["length"]:
            raise self._damaged("is truncated")
        return data[:end], header, data[end:]

    def _damaged(self, how: str) -> StorageError:
        return StorageError(
            f"The mapping {self.path} {how}: restore a backup of it. It was left as it is; without it, surrogates "
            "cannot become originals again, and a new mapping gives other ones."
        )


def _key_id(key: bytes) -> str:
    """Tells keys apart, and says nothing about them."""
    return hashlib.sha256(b"fedsea pseudonyms key id\0" + key).hexdigest()[:32]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
