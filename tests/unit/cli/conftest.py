"""What a command line sets for its process is undone after each test."""

from pathlib import Path

import pytest

from fedsea.cli import options


@pytest.fixture(autouse=True)
def undone(restored: None) -> None:
    """Every test here runs command lines in this process."""


@pytest.fixture
def without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands ask neither for an identity, a run folder nor a server: what would use them is stubbed."""

    def there(_folder: Path, *_: str) -> None:
        return

    monkeypatch.setattr(options, "need_identity", there)
    monkeypatch.setattr(options, "need_run", there)
    monkeypatch.setattr(options, "look_for_server", there)
