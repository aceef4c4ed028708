"""Mappings made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsea.plan.pseudonyms import PseudonymSettings
from fedsea.privacy.pseudonyms import Pseudonyms, open_pseudonyms
from tests.support.mapping import make_mapping


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Pseudonyms]:
    """Opens the mapping of this test's folder; keywords are settings."""

    def opened(owner: str = "clinic", **settings: Any) -> Pseudonyms:
        make_mapping(tmp_path, owner)
        return open_pseudonyms(PseudonymSettings(enabled=True, **settings), tmp_path, owner)

    return opened
