"""Where a client's releases are charged: one ledger for all that is done with an identity under a plan.

Training, evaluation and every use of the model add up, whatever their run folders, so the ledger is in the identity's
folder: `ledger/<beginning of the plan's hash>/`. A run folder says in `ledger.json` where its ledger is, and how far it
was a moment ago: an older copy is refused, unless the run folder was put back with it. A run that was trained alone,
where nothing leaves, has a ledger of its own in `ledger/`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsea.client.run_key import ALONE
from fedsea.errors import ConfigError, StorageError
from fedsea.plan import ClientNoise, FederationPlan, NoiseSection, load_settings, parse_plan_json
from fedsea.privacy.book import FILE, Book
from fedsea.privacy.boundary import Boundary
from fedsea.privacy.claims import report_of
from fedsea.privacy.ledger import Ledger
from fedsea.storage import CheckpointStore, write_bytes_atomic

FOLDER, POINTER = "ledger", "ledger.json"


def own_noise(settings: Path | None) -> ClientNoise:
    """The table `[noise]` of a client's settings file.

    Raises:
        ConfigError: The file cannot be used.
    """
    return ClientNoise() if settings is None else load_settings(settings).noise


def ledger_folder(plan: FederationPlan, run_id: str, identity: Path, run: Path) -> Path:
    """Where the ledger of a client is."""
    return run / FOLDER if run_id == ALONE else identity / FOLDER / plan.sha256()[:16]


@contextlib.contextmanager
def open_boundary(
    plan: FederationPlan, name: str, run_id: str, *, identity: Path, run: Path, settings: Path | None, own_run: bool
) -> Iterator[Boundary]:
    """The boundary of a client that talks to a server, with its ledger; closed with the context.

    Args:
        plan: The plan.
        name: The client.
        run_id: The server's run, or `ALONE`.
        identity: Folder of its identity.
        run: Its run folder.
        settings: Its settings file.
        own_run: Whether `run` is of this very run, and may say where the ledger is.

    Raises:
        ConfigError: The settings are laxer than the plan, or leave out what was stricter before.
        StorageError: The ledger is refused, is not the one that the run was charged to before, or the disk refused.
    """
    noise = own_noise(settings)
    if plan.trust.mode != "noised":
        yield Boundary.of(plan, name, settings=noise)
        return
    folder = ledger_folder(plan, run_id, identity, run)
    before = None if run_id == ALONE else _charged_before(plan, name, run)
    if before is not None and not (folder / FILE).is_file():
        raise _not_here(before.folder, folder)

    def note(count: int, last: str) -> None:
        kept = _Note(plan.sha256(), name, str(folder.resolve()), count, last)
        write_bytes_atomic(run / POINTER, json.dumps(asdict(kept)).encode())

    notes = run_id != ALONE and (own_run or (before is not None and os.access(run, os.W_OK)))
    noted = None if before is None else (before.count, before.hash)
    own = noise.over(plan, name)

    def allow(last: NoiseSection) -> None:
        _check_nothing_is_left_out(noise, own, last)

    with Ledger(folder, plan, name, run_id, own, noted=noted, note=note if notes else None, allow=allow) as ledger:
        yield Boundary.of(plan, name, ledger, noise)


def _check_nothing_is_left_out(named: ClientNoise, own: NoiseSection, last: NoiseSection) -> None:
    """Refuse noise that is laxer than the last only because this command's settings do not speak of it."""
    laxer = []
    for key in ClientNoise.model_fields:
        before, now = getattr(last, key), getattr(own, key)
        less = now < before if key.endswith("_std") else before and (not now or now > before)
        if less and getattr(named, key) is None:
            laxer.append(f"noise.{key} was {before:g} and would be the plan's {now:g}" + " (none)" * (not now))
    if laxer:
        raise ConfigError(
            f"This client was stricter before than with this command's settings: {'; '.join(laxer)}. Nothing was sent. "
            "Give the settings file that was used before with --settings; to be laxer on purpose, give one whose table "
            "[noise] names the new values."
        )


@dataclass(frozen=True, slots=True)
class _Note:
    """What a run folder says of its ledger: whose it is, where, its lines of late, and the hash of the last of them."""

    plan_sha256: str
    client: str
    folder: str
    count: int
    hash: str


def _charged_before(plan: FederationPlan, name: str, run: Path) -> _Note | None:
    """What a run folder says of its ledger, if it is of this client and plan."""
    note = _note_of(run)
    return note if note is not None and (note.plan_sha256, note.client) == (plan.sha256(), name) else None


def _note_of(run: Path) -> _Note | None:
    try:
        values = json.loads((run / POINTER).read_text(encoding="utf-8"))
        plan_sha256, client, folder, last = (str(values[key]) for key in ("plan_sha256", "client", "folder", "hash"))
        return _Note(plan_sha256, client, folder, int(values["count"]), last)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise StorageError(f"{run / POINTER} cannot be read: restore the newest copy of the run folder.") from None


def _not_here(before: str, folder: Path) -> StorageError:
    return StorageError(
        f"What this run has released was charged to the privacy ledger in {before}, and the one in {folder} is missing "
        f"or another: nothing was sent. Put the newest copy of that folder in its place, whole; without it nobody "
        "knows what was spent."
    )


def reports(path: Path) -> list[dict[str, Any]]:
    """What the ledgers of a folder say: see `privacy.claims.report_of`; for a run without one, why it has none.

    Raises:
        ConfigError: The folder holds neither a ledger nor a run.
        StorageError: A ledger is damaged or truncated.
    """
    found = []
    for folder in find_ledgers(path):
        note = None if folder in (path, path / FOLDER) else _note_of(path)
        book = Book.open(folder, None if note is None else (note.count, note.hash))
        client = str(book.about["client"])
        about = {"folder": str(folder), "plan": book.plan.name, "plan_sha256": book.about["plan_sha256"]}
        found.append(about | report_of(book.plan, client, book.spent, book.noise))
    if not found:
        latest = CheckpointStore(path / "checkpoints", read_only=True).latest()
        if latest is None or "plan" not in latest[2]:
            raise ConfigError(
                f"{path} holds no ledger and no run: give the run folder of `fedsea train`, or the identity's folder."
            )
        plan = parse_plan_json(latest[2]["plan"])
        about = {"folder": "", "plan": plan.name, "plan_sha256": plan.sha256()}
        found.append(about | report_of(plan, str(latest[2].get("client", "") or plan.client_names[0]), None))
    return found


def find_ledgers(path: Path) -> list[Path]:
    """The ledgers' folders that a run folder, an identity's folder or a ledger's folder stands for.

    Raises:
        ConfigError: What says where a run's ledger is cannot be read.
    """
    if (path / FILE).is_file():
        return [path]
    if (path / POINTER).is_file():
        try:
            return [Path(json.loads((path / POINTER).read_text(encoding="utf-8"))["folder"])]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path / POINTER} cannot be read: give the folder of the identity instead.") from None
    inside = path / FOLDER
    if (inside / FILE).is_file():
        return [inside]
    return sorted(found.parent for found in inside.glob(f"*/{FILE}"))
