"""The authority's journal: one JSON line for everything that it issued or revoked, only ever appended to.

A line counts once its newline is on disk. A kill in the middle of an append leaves a last line without one, which
readers ignore and the next append cuts off; so a server may read the file at any moment, without a lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsea.errors import StorageError
from fedsea.wire.identity.certificates import NAMED_ROLES, Role
from fedsea.wire.identity.files import disk_errors, sync_folder

FILE_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A certificate that the authority issued.

    Attributes:
        role: Client, server or relay.
        name: The client's or relay's name; a server's host names, joined by commas.
        serial: Serial number in hex.
        not_before: Beginning of validity.
        not_after: End of validity.
        key: Fingerprint of the owner's public key.
        pem: The certificate.
        renewed_from: Serial of the certificate that asked for this one, or "".
        revoked: Why and that it was revoked, or None.
    """

    role: Role
    name: str
    serial: str
    not_before: datetime
    not_after: datetime
    key: str
    pem: str
    renewed_from: str = ""
    revoked: str | None = None

    def status(self, now: datetime) -> str:
        """One of "revoked", "expired", "valid"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if now > self.not_after else "valid"


@dataclass(slots=True)
class Record:
    """What the journal's lines add up to.

    Attributes:
        entries: By serial, in the order of issue.
        revoked_names: Names that were revoked and not approved again since.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    revoked_names: set[str] = field(default_factory=set)

    def named(self, name: str) -> list[Entry]:
        """Every certificate of a client or relay of that name."""
        return [entry for entry in self.entries.values() if entry.role in NAMED_ROLES and entry.name == name]

    def renewals(self, entry: Entry) -> list[Entry]:
        """Certificates that the holder of this one asked for with it."""
        return [other for other in self.entries.values() if other.renewed_from == entry.serial]

    def successor(self, entry: Entry) -> Entry | None:
        """A certificate, not revoked, that a renewal put in the place of this one."""
        return next((other for other in self.renewals(entry) if other.revoked is None), None)

    def apply(self, line: Mapping[str, Any]) -> None:
        """Add one line's event."""
        match line["event"]:
            case "issued":
                entry = Entry(
                    role=Role(line["role"]),
                    name=str(line["name"]),
                    serial=str(line["serial"]),
                    not_before=_time(line["not_before"]),
                    not_after=_time(line["not_after"]),
                    key=str(line["key"]),
                    pem=str(line["pem"]),
                    renewed_from=str(line["renewed_from"]),
                )
                self.entries[entry.serial] = entry
                if entry.role in NAMED_ROLES:
                    self.revoked_names.discard(entry.name)
            case "revoked":
                self._revoke(str(line["name"]), str(line["serial"]), str(line["reason"]))
            case _:
                raise ValueError("unknown event")

    def _revoke(self, name: str, serial: str, reason: str) -> None:
        if serial:
            chosen = self._with_renewals(self.entries[serial])
        else:
            self.revoked_names.add(name)
            chosen = self.named(name)
        for entry in chosen:
            if entry.revoked is None:
                self.entries[entry.serial] = replace(entry, revoked=reason)

    def _with_renewals(self, entry: Entry) -> list[Entry]:
        """A certificate and all that descend from it: whoever stole its key may have renewed it."""
        return [entry, *(one for other in self.renewals(entry) for one in self._with_renewals(other))]


def _time(text: object) -> datetime:
    moment = datetime.fromisoformat(str(text))
    if moment.tzinfo is None:
        raise ValueError("time without zone")
    return moment


def issued_line(entry: Entry, at: datetime) -> dict[str, Any]:
    """The event that says that a certificate was issued."""
    return {
        "event": "issued",
        "at": at.isoformat(),
        "role": entry.role.value,
        "name": entry.name,
        "serial": entry.serial,
        "not_before": entry.not_before.isoformat(),
        "not_after": entry.not_after.isoformat(),
        "key": entry.key,
        "pem": entry.pem,
        "renewed_from": entry.renewed_from,
    }


def revoked_line(name: str, serial: str, reason: str, at: datetime) -> dict[str, Any]:
    """The event that revokes one certificate, or with serial "" every certificate of a name."""
    return {"event": "revoked", "at": at.isoformat(), "name": name, "serial": serial, "reason": reason}


def read_journal(path: Path) -> Record:
    """Add up the journal's whole lines.

    Raises:
        StorageError: It is missing, cannot be read, or a whole line is damaged; nobody is admitted on a guess.
    """
    with disk_errors("read", path):
        data = path.read_bytes()
    record = Record()
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record.apply(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise StorageError(
                f"Line {number} of {path} is damaged: restore the file from a backup; without it revoked clients "
                "could not be told from others."
            ) from None
    return record


def create_journal(path: Path) -> None:
    """Make an empty journal if there is none."""
    with disk_errors("write", path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        sync_folder(path.parent)


def append_line(path: Path, event: Mapping[str, Any]) -> None:
    """Append one event durably; call it with the folder's lock held."""
    line = json.dumps(event, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
    with disk_errors("write", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            end = _whole_bytes(path)
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _whole_bytes(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1
