"""A federation from start to end, on threads."""

from __future__ import annotations


def test_a_federation_trains_to_its_end(federation):
    fed = federation("a", "b")
    parts = fed.train(evaluate=True)
    for part in parts.values():
        assert part.result.next_step == 6
        assert [report.step for report in part.watch.steps] == list(range(6))
        assert part.result.loss_after < part.result.loss_before
