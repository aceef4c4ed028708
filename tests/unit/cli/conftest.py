"""What a command line sets for its process is undone after each test."""

import logging
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handlers, level, term = logging.root.handlers[:], logging.root.level, signal.getsignal(signal.SIGTERM)
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("fedsea").setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    signal.signal(signal.SIGTERM, term)
