"""The only exit of a client."""

from __future__ import annotations

import copy

import pytest
import torch

from fedsea.errors import NonFiniteError, UnprotectedRelease
from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel, Release
from fedsea.wire.encoding import Encoder
from fedsea.wire.messages import Forward

BOUNDARY = Boundary("trusted-server")


def test_the_trust_mode_says_that_the_server_can_read_the_text():
    assert "CAN reconstruct" in BOUNDARY.statement


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [BOUNDARY.hidden, BOUNDARY.gradient, lambda t: BOUNDARY.update({"x": t})])
def test_values_that_are_not_finite_do_not_leave(make, bad):
    tensor = torch.ones(3, 4)
    tensor[1, 2] = bad
    with pytest.raises(NonFiniteError, match="nothing was sent"):
        make(tensor)


def test_large_values_whose_sum_overflows_are_finite_all_the_same():
    tensor = torch.full((4,), 3e38)
    assert torch.equal(BOUNDARY.hidden(tensor).take()[""], tensor)


def test_a_release_is_taken_once():
    release = BOUNDARY.update({"x": torch.ones(1)})
    assert release.channel is Channel.UPDATE
    release.take()
    with pytest.raises(UnprotectedRelease, match="twice"):
        release.take()


def test_a_release_made_elsewhere_is_refused():
    with pytest.raises(UnprotectedRelease, match="only the privacy boundary"):
        Release({"": torch.ones(1)}, Channel.HIDDEN)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda release: release.__reduce_ex__(4)])
def test_a_release_cannot_be_copied_to_be_taken_twice(copied):
    with pytest.raises(UnprotectedRelease, match="copied"):
        copied(BOUNDARY.update({"x": torch.ones(1)}))


def test_a_release_has_no_subclass_with_rules_of_its_own():
    with pytest.raises(UnprotectedRelease, match="privacy boundary did not make"):

        class Twice(Release):
            pass


class _Disguised:
    """Says that it is a release, and gives its tensors as often as asked."""

    __class__ = Release
    channel = Channel.HIDDEN

    def take(self):
        return {"": torch.ones(2, 3)}


def test_what_only_claims_to_be_a_release_is_not_encoded():
    disguised = _Disguised()
    assert isinstance(disguised, Release)
    encoder = Encoder("client", {Channel.HIDDEN: "fp32"})
    with pytest.raises(UnprotectedRelease, match="privacy boundary"):
        encoder.seal(disguised)
    with pytest.raises(UnprotectedRelease, match="privacy boundary"):
        encoder.encode(Forward(0, 0, 0, 1, BlockRange(1, 2), (2,), 2, False, disguised))


def test_a_release_carries_no_graph():
    tensor = torch.ones(2, requires_grad=True) * 2
    assert not BOUNDARY.hidden(tensor).take()[""].requires_grad
