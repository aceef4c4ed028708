"""The lines of a ledger: read, checked against each other and the anchor, and added up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsea.errors import StorageError
from fedsea.plan import FederationPlan, NoiseSection, parse_plan_json
from fedsea.privacy.spent import Spent
from fedsea.storage import storage_error

FILE, ANCHOR = "ledger.jsonl", "ledger.anchor"
"""Names of a ledger's two files."""

VERSION = 1
"""Of the lines; a ledger of another one is refused."""


class Book:
    """The lines of a ledger, read and added up.

    Args:
        folder: Where the ledger is; its anchor is read at once, so that lines which come later cannot be missed.
        noted: How many lines it had once, and the hash of the last of them, as somebody else noted; None: nobody did.

    Raises:
        StorageError: The anchor cannot be read.

    Attributes:
        count: Lines.
        num_bytes: Their length.
        hash: Of the last one.
        about: What the first one says.
        anchor: How many lines there were a while ago, and the hash of the last of them; None for a new ledger.
        runs: The server's runs that were charged, in order, and the client's noise in each.
    """

    def __init__(self, folder: Path, noted: tuple[int, str] | None = None) -> None:
        self._path = folder / FILE
        self.anchor = _read_anchor(folder / ANCHOR)
        self.count = 0
        self.num_bytes = 0
        self.hash = ""
        self.about: dict[str, Any] = {}
        self.runs: list[tuple[str, NoiseSection]] = []
        self.spent = Spent()
        self._noted = noted
        self._met: set[tuple[int, str] | None] = {None}

    @classmethod
    def open(cls, folder: Path, noted: tuple[int, str] | None = None) -> Book:
        """Read a ledger without charging it; see `Book`.

        Raises:
            StorageError: It is not there, damaged or truncated.
        """
        book = cls(folder, noted)
        try:
            raw = (folder / FILE).read_bytes()
        except OSError as error:
            raise storage_error("read", folder / FILE, error) from None
        book.read(raw)
        book.check({"version": VERSION})
        return book

    @property
    def plan(self) -> FederationPlan:
        """The plan whose releases are charged."""
        return parse_plan_json(self.about["plan"])

    @property
    def noise(self) -> NoiseSection:
        """The client's noise of late."""
        return self.runs[-1][1] if self.runs else self.plan.noise

    @property
    def end(self) -> bytes:
        """The last bytes of what was read: those that no other line ends with."""
        return f'"hash":"{self.hash}"}}\n'.encode() if self.count else b""

    def line_of(self, entry: Mapping[str, Any]) -> bytes:
        """The next line, with its hash."""
        text = json.dumps(entry, separators=(",", ":"))
        return f'{text[:-1]},"hash":"{_chained(self.hash, text)}"}}\n'.encode()

    def read(self, raw: bytes) -> None:
        """Add complete lines; a last one without its end is left.

        Raises:
            StorageError: A line is not what was written.
        """
        complete = raw[: raw.rfind(b"\n") + 1]
        for line in complete.split(b"\n")[:-1]:
            text, mark, tail = line.rpartition(b',"hash":"')
            try:
                body = text.decode() + "}"
                entry = json.loads(body)
                good = bool(mark) and tail.decode() == f'{_chained(self.hash, body)}"}}'
            except ValueError:
                good = False
            if not good:
                raise refused(self._path, f"line {self.count + 1} is not what was written")
            self.hash = tail[:-2].decode()
            self.count += 1
            self.num_bytes += len(line) + 1
            if (here := (self.count, self.hash)) in (self.anchor, self._noted):
                self._met.add(here)
            self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        try:
            if "about" in entry:
                self.about = dict(entry["about"])
                self.spent.salt = bytes.fromhex(self.about["salt"])
            elif "run" in entry:
                self.runs.append((str(entry["run"]), NoiseSection.model_validate(entry["noise"])))
            else:
                self.spent.take(entry)
        except (KeyError, TypeError, ValueError, IndexError):
            raise refused(self._path, f"line {self.count} is of another version of fedsea") from None

    def check(self, about: Mapping[str, Any]) -> None:
        """Refuse a ledger that is another's, or that has lost lines.

        Raises:
            StorageError: Says which.
        """
        for key, what in (("version", "version of fedsea"), ("plan_sha256", "plan"), ("client", "client")):
            if self.about and key in about and self.about.get(key) != about[key]:
                raise refused(self._path, f"it belongs to another {what}")
        if self.anchor is None:
            if self.count > 1:
                raise refused(self._path, f"its {ANCHOR} is missing")
        elif self.anchor not in self._met:
            raise refused(
                self._path,
                f"it had {self.anchor[0]} lines and now has {self.count}, or others: it was truncated or replaced",
            )
        if self._noted not in self._met:
            raise refused(
                self._path,
                f"it had {self._noted[0] if self._noted else 0} lines when this run was last charged to it and now has "
                f"{self.count}, or others: it is another ledger, or an old copy was put back",
            )
        if not self.about:
            raise refused(self._path, "it has no first line")


def _chained(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()


def _read_anchor(path: Path) -> tuple[int, str] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return int(values["count"]), str(values["hash"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise refused(path, "it cannot be read") from None


def refused(path: Path, reason: str) -> StorageError:
    """A ledger that is not used, with the reason."""
    return StorageError(
        f"The privacy ledger {path} is refused: {reason}. Nothing was sent. Put back the newest copy of its folder; "
        "without it nobody knows what was spent, and nothing can be claimed for what was released before."
    )
