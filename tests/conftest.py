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


LONG = (
    "privacy/test_audit_soundness_forward.py",
    "unit/cli/test_audit.py",
    "privacy/test_server_memory.py",
    "fault/test_hostile_client.py",
    "fault/test_wire_fuzz.py",
    "integration/test_behind_a_relay.py",
    "privacy/test_audit_finds_faults.py",
    "privacy/test_audit_soundness_mechanism.py",
    "integration/test_gateway_command.py",
    "fault/test_blips.py",
    "parity/test_causal_lm.py",
    "parity/test_model_parity.py",
    "privacy/test_audit_updates.py",
    "privacy/test_audit_passes.py",
    "parity/test_training_parity.py",
    "integration/test_noised.py",
    "privacy/test_audit_in_use.py",
    "unit/audit/test_search.py",
    "parity/test_cache_parity.py",
    "parity/test_speculation_parity.py",
    "privacy/test_audit_inverter.py",
    "integration/test_quickstart.py",
    "integration/test_sessions.py",
    "fault/test_noised_killed.py",
    "integration/test_secure_rounds.py",
    "fault/test_broken_connections.py",
)
"""Files that take a minute or more begin first: whichever came last would run alone while other workers wait."""


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep that order; by itself it takes the files with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; all else stays as it is."""
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


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
