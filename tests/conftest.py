"""What tests of several folders share: one thread a process, a small base model, identities."""

from __future__ import annotations

import os

# Before torch is imported anywhere, and whatever the environment says: the tests compare bits, which depend on it.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.federation import Federation

# What these fixtures need is imported where they need it: the process that hands out the tests runs none.


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no collection of garbage has to go through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 5 blocks with a tokenizer of one token a byte."""
    from tests.support.assets import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server and the clients of `NAMES`, enrolled."""
    from tests.support.federation import NAMES, make_identities

    return make_identities(tmp_path_factory.mktemp("identities"), NAMES)


@pytest.fixture
def federation(tmp_path: Path, base_model: Path, identities: Path) -> Iterator[Callable[..., Federation]]:
    """Makes federations of a test; whatever they started is ended with it."""
    from tests.support.federation import Federation

    made: list[Federation] = []

    def make(*names: str, **plan: Any) -> Federation:
        folder = tmp_path / f"federation-{len(made)}"
        made.append(Federation(folder, base_model, identities, names or ("a", "b"), plan))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def restored() -> Iterator[None]:
    """Undo what a command line sets for its process."""
    handlers, level, term = logging.root.handlers[:], logging.root.level, signal.getsignal(signal.SIGTERM)
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("fedsea").setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    signal.signal(signal.SIGTERM, term)
