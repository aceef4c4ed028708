"""Secure rounds through real streams, with members that drop out, and processes that are killed."""

from __future__ import annotations

import torch


def rounds_of(federation):
    return federation.durable()["rounds"][0]


def test_a_secure_round_equals_the_plain_mean(federation):
    plans = {"training": {"rounds": 1}}
    plain = federation("a", "b", "c", **plans)
    plain.train()
    secure = federation("a", "b", "c", aggregation={"secure": True}, **plans)
    secure.train()
    expected, found = rounds_of(plain), rounds_of(secure)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2**-23, atol=2**-28)
