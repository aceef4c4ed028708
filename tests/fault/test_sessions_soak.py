"""A small soak of sessions; `tests.fault.sessions_soak` says how to run the full one."""

from __future__ import annotations

from tests.fault.sessions_soak import soak


def test_random_sessions_of_several_processes_see_nothing_of_each_other_and_leave_nothing(tmp_path, identities):
    found = soak(tmp_path, identities, num_processes=3, num_sequences=24)
    assert found["processes"] > 6, "some were killed"
    assert found["tokens"] > 500
    assert not any(any(held.values()) for held in found["left"])
    assert found["grown_bytes"] < found["passed_bytes"] / 2
