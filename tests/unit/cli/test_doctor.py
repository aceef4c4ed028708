"""`fedsea doctor`: each check can find what it looks for."""

import io
import json
import re
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import rich.console
from rich.console import Console

from fedsea.cli import checks, doctor, main
from fedsea.cli import federation_checks as federation
from fedsea.cli.checks import Check, attempt
from fedsea.cli.federation_checks import Federation
from fedsea.errors import AuthError
from fedsea.wire.identity import Authority, Identity, enroll, install
from tests.support.assets import toml


def states(found: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.state) for check in found]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.9,<2.14", True),
        ("2.9", ">=2.9.0", True),
        ("2.14.0", ">=2.9,<2.14", False),
        ("2.10rc1", ">=2.9", True),
        ("2.8.9", ">=2.9", False),
        ("6.0.0", ">=5.0,<6", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert checks.satisfies(version, wanted) is fits


def test_the_ranges_are_those_of_the_package() -> None:
    found = checks._requirements()
    assert found["torch"] == "<2.14,>=2.9"
    assert set(checks._PACKAGES) <= found.keys()


def test_a_package_that_is_missing_or_too_old_fails_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError
        return "0.0.1" if name == "torch" else "9" if name == "grpcio" else "5.5"

    monkeypatch.setattr(metadata, "version", version)
    found = {check.name: check for check in checks.packages()}
    assert (found["torch"].state, found["peft"].state, found["grpcio"].state) == ("fail", "fail", "ok")
    assert found["torch"].advice == "pip install 'torch<2.14,>=2.9'"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_doctor_says_at_a_terminal_what_it_looks_at(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = io.StringIO()
    monkeypatch.setattr(rich.console, "Console", partial(Console, file=out, force_terminal=terminal, width=80))
    with doctor._told(silent=False) as say:
        say("the server")
        assert ("Looking at the server" in out.getvalue()) == terminal
    said = len(out.getvalue())
    with doctor._told(silent=True) as say:
        say("the server")
    assert len(out.getvalue()) == said


def test_the_doctor_names_what_takes_long_before_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    monkeypatch.setattr(checks, "gpu", lambda: Check("gpu", "ok", f"after {told[-1]}"))
    monkeypatch.setattr(federation, "server", lambda *_: [Check("server", "ok", f"after {told[-1]}")])
    for check in doctor._checks("h:1", tmp_path, None, None, None, tmp_path, told.append):
        if check.name in ("gpu", "server"):
            assert check.found == f"after the {check.name.replace('gpu', 'GPU')}"
    assert told == ["the packages", "the GPU", "the disk", "the identity", "the server", "the plan", "the base model"]


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checks, "_fsync_seconds", refuse)
    assert checks.disk(tmp_path / "runs").state == "fail"


@pytest.mark.parametrize(("seconds", "state"), [(0.2, "warn"), (0.001, "ok")])
def test_a_slow_disk_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, state: str) -> None:
    monkeypatch.setattr(checks, "_fsync_seconds", lambda _: seconds)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert checks.disk(tmp_path / "not" / "there").state == state


def test_the_disk_check_leaves_nothing(tmp_path: Path) -> None:
    checks.disk(tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_the_finding_of_its_check() -> None:
    def fail() -> list[Check]:
        raise AuthError("The certificate has expired: enrol again.")

    assert attempt("identity", fail) == [Check("identity", "fail", "The certificate has expired: enrol again.")]


# --- identity, server, clock ----------------------------------------------------------------------------------------


def test_no_identity_is_only_looked_at_unless_one_was_asked_for(tmp_path: Path) -> None:
    found = Federation()
    assert states(federation.identity(tmp_path / "identity", False, found)) == [("identity", "warn")]
    asked = attempt("identity", lambda: federation.identity(tmp_path / "identity", True, found))
    assert states(asked) == [("identity", "fail")]


def enrolled(folder: Path, days: float) -> Path:
    authority = Authority.create(folder / "ca", "test", clock=lambda: datetime.now(UTC) - timedelta(days=20))
    certificate = authority.approve(enroll(folder / "me", "clinic").csr_pem, days=days)
    install(folder / "me", certificate.pem, authority.ca_pem, authority.fingerprint)
    return folder / "me"


def test_an_identity_shows_its_days_and_its_authority(identities: Path) -> None:
    found = Federation()
    ours = federation.identity(identities / "a", True, found)
    assert states(ours) == [("identity", "ok"), ("authority", "ok")]
    assert "client a, 29 days left" in ours[0].found
    assert ours[1].found == Authority.open(identities / "ca").fingerprint
    assert found.identity is not None


def test_an_identity_that_soon_expires_is_looked_at(tmp_path: Path) -> None:
    found = federation.identity(enrolled(tmp_path, days=21), True, Federation())
    assert states(found)[0] == ("identity", "warn")


def test_a_server_that_nobody_serves_fails_with_what_to_do(identities: Path) -> None:
    found = Federation(Identity.load(identities / "a"))
    (check,) = attempt("server", lambda: federation.server("127.0.0.1:1", found))
    assert check.state == "fail"
    assert "fedsea server" in check.found


def test_an_unreachable_server_is_reported_once(
    tmp_path: Path, identities: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--server", "127.0.0.1:1", "--identity", str(identities / "a"), "--run", str(tmp_path)]
    assert main.run(["doctor", "--json", *asked]) == 1
    failed = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if check["state"] == "fail"]
    assert failed == ["server"]


def test_a_server_is_not_asked_without_an_identity() -> None:
    assert states(federation.server("127.0.0.1:1", Federation())) == [("server", "fail")]


@pytest.mark.parametrize(("ahead", "state"), [(0.5, "ok"), (-60.0, "warn"), (4000.0, "fail")])
def test_the_clock_is_compared_with_the_servers(ahead: float, state: str) -> None:
    now = time.time()
    assert states(federation._clock({"time": now - ahead}, now, 0.0)) == [("clock", state)]


# --- plan, model, memory --------------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path: Path, base_model: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(toml({"model": {"path": str(base_model)}, "clients": [{"name": "a"}, {"name": "b"}]}))
    return path


def test_a_clients_limits_are_held_against_the_plan(tmp_path: Path, plan_file: Path, identities: Path) -> None:
    (tmp_path / "client.toml").write_text("[limits]\nmin_input_blocks = 2\n")
    found = Federation(Identity.load(identities / "a"))
    refused = attempt("plan", lambda: federation.plan(plan_file, None, tmp_path / "client.toml", found))
    assert states(refused) == [("plan", "fail")]
    assert states(federation.plan(plan_file, None, None, found)) == [("plan", "ok"), ("limits", "ok")]


@pytest.mark.parametrize("who", ["a", "server"])
@pytest.mark.parametrize(("free", "state"), [(1 << 40, "ok"), (1000, "fail")])
def test_memory_for_this_sides_segments(
    plan_file: Path, identities: Path, monkeypatch: pytest.MonkeyPatch, who: str, free: int, state: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    found = Federation(Identity.load(identities / who))
    federation.plan(plan_file, None, None, found)
    assert states(federation.model(None, found)) == [("model", "ok"), ("adapters", "ok"), ("memory", state)]


@pytest.mark.parametrize("who", ["a", "server"])
def test_memory_that_copies_take_while_decoding_is_said_and_may_be_tight_but_is_not_needed(
    plan_file: Path, identities: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    from fedsea.model import products

    monkeypatch.setattr(products, "_onednn", lambda: object())
    monkeypatch.setattr(products, "_likes_columns", lambda: True)
    found = Federation(Identity.load(identities / who))
    federation.plan(plan_file, None, None, found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    ample = federation.model(None, found)[-1]
    taken, copied = re.findall(r"(?:takes?|up to) ([0-9.]+) KB", ample.found)
    assert float(copied) <= 2 * float(taken)
    free = int(1.02 * 1000 * float(taken) / 0.7)  # enough for the weights by themselves
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert federation.model(None, found)[-1].state == "warn"
    monkeypatch.setattr(products, "_onednn", lambda: None)
    without = federation.model(None, found)[-1]
    assert (without.state, "copies" in without.found) == ("ok", False)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter": {"targets": ["nonsense"]}}, "'nonsense' names no linear layer"),
        ({"partition": {"input_blocks": 50}}, "leave no trunk"),
        ({"wire": {"max_tensor_mb": 1}, "data": {"max_tokens": 100_000}}, "raise wire.max_tensor_mb"),
    ],
)
def test_a_plan_that_the_server_would_refuse_is_refused_here(
    tmp_path: Path, base_model: Path, values: dict[str, Any], says: str
) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(toml({"model": {"path": str(base_model)}, "clients": [{"name": "a"}]} | values))
    found = Federation()
    federation.plan(path, None, None, found)
    checks = federation.model(None, found)
    assert states(checks) == [("model", "ok"), ("adapters", "fail")]
    assert says in checks[-1].found


def test_both_sides_together_need_the_whole_model(plan_file: Path, base_model: Path) -> None:
    from fedsea.model.checkpoint import open_checkpoint
    from fedsea.plan import load_plan
    from fedsea.types import SegmentKind

    checkpoint, plan = open_checkpoint(str(base_model)), load_plan(plan_file)
    last = checkpoint.num_blocks
    parts = [
        (SegmentKind.INPUT, range(1)),
        (SegmentKind.TRUNK, range(1, last - 1)),
        (SegmentKind.OUTPUT, range(last - 1, last)),
    ]
    needed = sum(federation.segment_bytes(checkpoint, plan, kind, blocks, "adapter") for kind, blocks in parts)
    names = checkpoint.tensor_names
    stored = sum(tensor.numel() for _, tensor in checkpoint.read(names))
    tied = 0 if "lm_head.weight" in names else next(t.numel() for n, t in checkpoint.read(names) if "embed_tokens" in n)
    assert needed == 4 * (stored + tied)


def test_a_folder_that_is_no_checkpoint_fails(tmp_path: Path) -> None:
    found = attempt("model", lambda: federation.model(str(tmp_path), Federation()))
    assert states(found) == [("model", "fail")]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_1_if_anything_fails(
    tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["doctor", "--json", "--plan", str(plan_file), "--run", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert {"python", "torch", "gpu", "disk", "plan", "model", "adapters", "memory"} <= {
        c["name"] for c in document["checks"]
    }
    assert main.run(["doctor", "--json", "--plan", str(tmp_path / "none.toml"), "--run", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_table_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--identity", str(tmp_path / "none"), "--run", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "✗ identity" in shown
    assert "fedsea enroll" in shown
    assert "1 in the way" in shown


def test_a_terminal_gets_a_fingerprint_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (":".join(f"{byte:02X}" for byte in half) for half in (range(16), range(16, 32)))
    out = io.StringIO()
    monkeypatch.setattr(
        rich.console, "Console", partial(Console, file=out, force_terminal=True, width=80, color_system=None)
    )
    doctor._show([Check("authority", "ok", f"{first}:{second}", "compare it")])
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[0].endswith(f"{first}:")
    assert lines[1].startswith(second)
