"""What a client has spent under a plan: an append-only file that is durable before anything is sent.

    ledger.jsonl     one JSON object a line; each holds the hash of itself and of the line before
    ledger.anchor    how many lines there were, and the hash of the last of them, a moment ago

The first line names the plan and the client. A process that is killed while it writes leaves at most a torn last line,
for which nothing was sent: it is cut off. A charge that is complete counts, whether or not its release was sent. The
anchor is never ahead: a ledger with fewer lines than it says was truncated or put back from an old copy, and refused.
It is written at the first charge of a process, at the first that comes a second or more after it, and at the end; so it
lags behind by the charges of one second at most. Only a process that was killed leaves it so: whole lines that are lost
just there are not missed. A copy of both files that was put back is found by what a run folder noted (see
`client.accounts`), if that is not old itself. This finds accidents and restored copies; who may write all of these
files can forge them.

Several processes of one client (training and a gateway, say) may charge the same ledger: each takes the file's lock for
the moment of a charge, and reads what the others have appended. A file that is not where it was opened any more, or
whose lines are not those that were read, is not charged: the next process would not find the charge.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from fedsea.errors import BudgetExhausted, StorageError
from fedsea.plan import FederationPlan, NoiseSection
from fedsea.privacy.book import ANCHOR, FILE, VERSION, Book, refused
from fedsea.privacy.pricing import Charge
from fedsea.privacy.spent import Spent
from fedsea.storage import storage_error, sync_folder, write_bytes_atomic

_ANCHOR_EVERY_S = 1.0


class Ledger:
    """The ledger of one client and plan. Any thread may charge it.

    Args:
        folder: Where its two files are; made if absent.
        plan: The plan whose releases are charged.
        client: The client.
        run_id: The server's run that is charged from now on; noted, and spending goes on over several.
        noise: The client's noise, if it is stricter than the plan's; noted too.
        noted: How many lines it had, and the hash of the last one, when it was used before; None if nobody knows.
        note: Told the same whenever the anchor is written.
        allow: Told the noise that was charged with last, before another one is noted; refuses that by raising.

    Raises:
        StorageError: The ledger is damaged, truncated, or of another plan or client; or the disk refused.
    """

    def __init__(
        self,
        folder: Path,
        plan: FederationPlan,
        client: str,
        run_id: str = "",
        noise: NoiseSection | None = None,
        *,
        noted: tuple[int, str] | None = None,
        note: Callable[[int, str], None] | None = None,
        allow: Callable[[NoiseSection], None] | None = None,
    ) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._about = {"version": VERSION, "plan_sha256": plan.sha256(), "client": client}
        self._thread_lock = threading.Lock()
        self._pid = os.getpid()
        self._anchored = (0, 0.0)
        self._note = note
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("open", self._path, error) from None
        try:
            with self._held():
                self._book = Book(folder, noted)
                self._catch_up()
                self._begin(plan, new=noted is None)
                now = (run_id, plan.noise if noise is None else noise)
                if self._book.runs[-1:] != [now]:
                    if allow is not None and self._book.runs:
                        allow(self._book.noise)
                    self._append({"run": run_id, "noise": now[1].model_dump(mode="json")})
                self._anchored = (self._anchored[0], -math.inf)  # the first charge is anchored at once
        except BaseException:
            os.close(self._file)
            raise

    @property
    def spent(self) -> Spent:
        """What was spent, as far as this process has read."""
        return self._book.spent

    def charge(self, charge: Charge, limit: float = float("inf")) -> None:
        """Make a charge durable; when this returns, the release may be sent.

        Args:
            charge: What the release costs.
            limit: The budget, as mu^2 of the unit that has spent most.

        Raises:
            BudgetExhausted: The charge would pass the budget; nothing was charged.
            StorageError: The disk refused, or another process has damaged the file.
        """
        with self._thread_lock, self._locked():
            spent = self._book.spent
            units, new = spent.numbered(charge.units)
            if not spent.room_for(units, charge.every, limit):
                raise BudgetExhausted(
                    "The privacy budget (noise.epsilon) does not cover the next release: nothing was sent, and what "
                    "was trained so far is kept. `fedsea ledger RUN` shows what was spent. To go on, agree "
                    "with the operator on a plan with more noise, fewer steps or a larger budget."
                )
            self._append(_entry_of(charge, units, new), durable=charge.bounded or not spent.unbounded)
            self._check_place()

    def close(self) -> None:
        """Anchor what was charged, and release the file; may be called twice."""
        with self._thread_lock:
            if self._file < 0:
                return
            try:
                with self._locked():
                    self._anchor(at_once=True)
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file for this process, and know what others have written."""
        with self._held():
            self._catch_up()
            yield

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if self._file < 0:
            raise StorageError(f"The ledger {self._path} is closed: nothing more can be charged to it.")
        if os.getpid() != self._pid:  # a lock is held by both processes of a fork
            raise StorageError(f"The ledger {self._path} was opened before this process was forked: open it in each.")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise storage_error("lock", self._path, error) from None
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _check_place(self) -> os.stat_result:
        try:
            opened = os.fstat(self._file)
            if not _is_at(self._path, opened):
                raise refused(self._path, "it was removed or replaced while it was in use")
        except OSError as error:
            raise storage_error("read", self._path, error) from None
        return opened

    def _catch_up(self) -> None:
        opened = self._check_place()
        try:
            size, end = opened.st_size, self._book.end
            if size < self._book.num_bytes:
                raise refused(self._path, "it has become shorter while it was in use")
            if _read(self._file, self._book.num_bytes - len(end), self._book.num_bytes) != end:
                raise refused(self._path, "its lines are others than those that were there before")
            if size > self._book.num_bytes:
                self._book.read(_read(self._file, self._book.num_bytes, size))
                if size > self._book.num_bytes:  # torn by a kill or a full disk: nothing was sent for it
                    os.ftruncate(self._file, self._book.num_bytes)
                    os.fsync(self._file)
        except OSError as error:
            raise storage_error("read", self._path, error) from None

    def _begin(self, plan: FederationPlan, *, new: bool) -> None:
        if new and not self._book.count and self._book.anchor is None:
            about = {**self._about, "plan": plan.to_json(), "salt": secrets.token_hex(16)}
            self._append({"about": about})
            self._sync_folders()
        self._book.check(self._about)
        self._anchor(at_once=True)

    def _append(self, entry: Mapping[str, Any], *, durable: bool = True) -> None:
        line = self._book.line_of(entry)
        before = self._book.num_bytes
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(28, "No space left on device")
            if durable:
                os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next one who takes the lock counts it, or cuts it off
                os.ftruncate(self._file, before)
            raise storage_error("charge a release to", self._path, error) from None
        self._book.read(line)
        self._anchor()

    def _anchor(self, *, at_once: bool = False) -> None:
        count, when = self._anchored
        if self._book.count == count or (not at_once and time.monotonic() - when < _ANCHOR_EVERY_S):
            return
        try:
            os.fsync(self._file)  # an anchor must not be ahead of its ledger, whatever happens to the machine
        except OSError as error:
            raise storage_error("write", self._path, error) from None
        text = json.dumps({"count": self._book.count, "hash": self._book.hash})
        write_bytes_atomic(self.folder / ANCHOR, text.encode())
        if self._note is not None:
            self._note(self._book.count, self._book.hash)
        self._anchored = (self._book.count, time.monotonic())

    def _sync_folders(self) -> None:
        """Make the names of file and folder durable, too."""
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            sync_folder(folder)


def _is_at(path: Path, opened: os.stat_result) -> bool:
    """Whether the file that is open is still the one that the next process will find."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, opened)


def _read(descriptor: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _entry_of(charge: Charge, units: list[tuple[int, float]], new: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"c": charge.channel.value, "p": charge.purpose.value, "n": charge.releases}
    if not charge.bounded:
        return entry | {"unbounded": True}
    if charge.every:
        entry["every"] = charge.every
    if units:
        if new:
            entry["new"] = new
        entry["units"] = [list(pair) for pair in units]
    return entry
