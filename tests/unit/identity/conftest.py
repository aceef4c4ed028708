"""An authority whose clock the test moves, and clients enrolled with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedsea.wire.identity import Authority, ClientCertificate, Identity, enroll, install


class MovedClock:
    """Time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.seconds = 0.0

    def __call__(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return self.seconds

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)
        self.seconds += timedelta(**by).total_seconds()


class Office:
    """An operator in one folder and its clients in others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = MovedClock()
        self.authority = Authority.create(folder / "ca", "test federation", clock=self.clock)

    def approve(self, asks_for: str, **options: object) -> ClientCertificate:
        return self.authority.approve(enroll(self.folder / asks_for, asks_for).csr_pem, **options)

    def add(self, name: str) -> Identity:
        return self.install(name, self.approve(name))

    def install(self, name: str, certificate: ClientCertificate) -> Identity:
        fingerprint = self.authority.fingerprint
        return install(self.folder / name, certificate.pem, None, fingerprint, clock=self.clock)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)
