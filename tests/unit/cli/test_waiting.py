"""How torch's threads wait is settled before torch is loaded, unless the user has settled it."""

from __future__ import annotations

import os

import pytest

from fedsea.cli import main


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what a command sets is undone
        monkeypatch.delenv(name)


def test_threads_wait_asleep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5")])
def test_what_the_user_set_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main.run(["version"]) == 0
    assert os.environ[name] == value
    assert (name == "OMP_WAIT_POLICY") == ("OMP_WAIT_POLICY" in os.environ)
