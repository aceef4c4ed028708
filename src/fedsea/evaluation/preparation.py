"""What a quickstart needs before its first process starts: model, silos, plans, an authority, identities."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from fedsea.plan import FederationPlan, load_plan
from fedsea.storage import check_new_folder, storage_error
from fedsea.wire.identity.authority import Authority
from fedsea.wire.identity.enrollment import enroll, install

CLIENTS = ("clinic", "bank", "law-office")


def prepare(folder: Path, steps: int | None, rows: int | None = None) -> None:
    """Copy model and silos, write the plans, make an authority, and enrol server and clients.

    Args:
        folder: Gets everything.
        steps: Optimizer steps in all; None takes the shipped plan's.
        rows: Of each silo, the first ones; None takes all.

    Raises:
        ConfigError: The folder holds something already.
        StorageError: The disk refused.
    """
    check_new_folder(folder, "--folder")
    try:
        text = _copy_assets(folder)
        if rows is not None:
            _shorten(folder / "silos", rows)
    except OSError as error:
        raise storage_error("write to", folder, error) from None
    if steps is not None:
        rounds = next(count for count in (4, 3, 2, 1) if steps % count == 0)
        text = _set(_set(text, "rounds", rounds), "steps_per_round", steps // rounds)
    (folder / "plan.toml").write_text(text)
    (folder / "central.toml").write_text(_central(text, load_plan(folder / "plan.toml")))
    authority = Authority.create(folder / "ca", "quickstart")
    authority.issue_server(["127.0.0.1", "localhost"], folder=folder / "server-identity")
    for name in CLIENTS:
        request = enroll(folder / "clients" / name, name)
        certificate = authority.approve(request.csr_pem)
        ca_pem = (folder / "ca" / "ca.pem").read_bytes()
        install(folder / "clients" / name, certificate.pem, ca_pem, authority.fingerprint)


def _copy_assets(folder: Path) -> str:
    """Copy model and silos; the text of the shipped plan."""
    with resources.as_file(resources.files("fedsea") / "assets") as source:
        for part in ("model", "silos"):
            (folder / part).mkdir(parents=True)
            for file in (source / part).iterdir():
                shutil.copyfile(file, folder / part / file.name)
        return (source / "plan.toml").read_text(encoding="utf-8")


def _shorten(silos: Path, rows: int) -> None:
    for silo in silos.glob("*.jsonl"):
        silo.write_text("".join(silo.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    (silos / "manifest.json").unlink()  # of the whole silos


def _set(text: str, key: str, value: float) -> str:
    lines = [f"{key} = {value}" if line.split("=")[0].strip() == key else line for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _central(text: str, plan: FederationPlan) -> str:
    """The same plan with one client that has everybody's training text and the union's batch."""
    lines = text[: text.index("[[clients]]")].splitlines()
    settings = _set("\n".join(line for line in lines if not line.startswith("#")).strip(), "holdout", 0.0)
    sequences = sum(plan.micro_batches_of(name)[1] for name in plan.client_names)
    return (
        "# The central run that the federation is compared with: the same plan with one client, which has the\n"
        f"# training text of all silos (pooled-train.jsonl) and the batch of all clients.\n{settings}\n"
        f'[[clients]]\nname = "central"\nmicro_batch_sequences = {sequences}\n'
    )
