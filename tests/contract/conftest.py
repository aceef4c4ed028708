"""Both kinds of trunk for suites that run against either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.contract.trunks import Bench
    from tests.support.federation import Federation


@pytest.fixture(params=["local", "remote"])
def bench(request: pytest.FixtureRequest, federation: Callable[..., Federation]) -> Iterator[Callable[..., Bench]]:
    """Makes benches of a federation of one client, with the module's `PLAN` where it has one."""
    from tests.contract.trunks import local_bench, remote_bench

    made: list[Bench] = []

    def make(**plan: object) -> Bench:
        build = local_bench if request.param == "local" else remote_bench
        made.append(build(federation("a", **{**getattr(request.module, "PLAN", {}), **plan})))
        return made[-1]

    yield make
    for one in made:
        one.close()
