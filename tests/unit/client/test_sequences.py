"""Sequences give back what they took, whatever becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsea.client.local_trunk import LocalTrunk
from fedsea.errors import ConfigError
from tests.support.opened import open_local, pages


def test_caches_here_are_given_back_when_the_trunk_opens_no_session(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_local(base_model)

    def refuse(*_: Any) -> None:
        raise ConfigError("No sessions here.")

    monkeypatch.setattr(LocalTrunk, "open_session", refuse)
    with pytest.raises(ConfigError, match="No sessions here"):
        opened.decoder.open(8, num_sequences=2)
    assert pages(opened) == [0, 0, 0]
