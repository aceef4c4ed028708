"""What a command line sets for its process is undone after each test."""

import pytest


@pytest.fixture(autouse=True)
def undone(restored: None) -> None:
    """Every test here runs command lines in this process."""
