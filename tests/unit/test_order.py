"""The order of the tests: what takes long begins first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest

TESTS = Path(__file__).parents[1]


def test_long_files_begin_first_in_their_order_and_the_rest_stays() -> None:
    names = ["unit/test_plan.py", conftest.LONG[1], "contract/test_codecs.py", conftest.LONG[0], "unit/test_plan.py"]
    items = [SimpleNamespace(path=TESTS / name, number=number) for number, name in enumerate(names)]
    conftest.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.number for item in items] == [3, 1, 0, 2, 4]


def test_long_files_are_there() -> None:
    assert [name for name in conftest.LONG if not (TESTS / name).is_file()] == []


def test_the_order_reaches_the_workers(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("loadscopereorder", False) is False
