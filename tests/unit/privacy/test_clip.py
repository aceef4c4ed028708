"""Clipping: what comes out is within its bound, in double precision, and what was within it is untouched."""

from __future__ import annotations

import pytest
import torch

from fedsea.privacy.clip import clip_rows, clip_sequences, clip_together


def norms_of(values_TH: torch.Tensor, lengths: tuple[int, ...]) -> list[float]:
    return [float(part.double().norm()) for part in values_TH.split(lengths)]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_is_within_its_bound_whatever_its_size(scale, dtype):
    values_TH = (torch.randn(12, 16) * scale).to(dtype)
    lengths = (5, 1, 0, 6)
    clipped = clip_sequences(values_TH, lengths, 0.5)
    assert clipped.dtype is torch.float32
    assert max(norms_of(clipped, lengths)) <= 0.5
    if scale > 1:
        assert min(norm for norm, length in zip(norms_of(clipped, lengths), lengths, strict=True) if length) > 0.4999
    if scale == 1e-30:
        assert torch.equal(clipped, values_TH.float())


def test_one_sequence_does_not_change_another():
    one, other, long = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4, 8) * 1000
    first = clip_sequences(torch.cat([one, other]), (3, 4), 1.0)[:3]
    assert torch.equal(first, clip_sequences(torch.cat([one, long]), (3, 4), 1.0)[:3])


def test_rows_are_clipped_each_by_itself():
    values_TH = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped = clip_rows(values_TH, 1.0)
    assert clipped.double().norm(dim=1).max() <= 1.0
    assert clipped[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-4)
    assert torch.equal(clipped[1:], values_TH[1:])


def test_an_update_is_clipped_by_the_norm_of_all_its_tensors():
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    clipped = clip_together(tensors, 0.25)
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    after = torch.cat([tensor.flatten() for tensor in clipped.values()])
    assert after.double().norm() <= 0.25
    assert torch.nn.functional.cosine_similarity(whole, after, dim=0) > 0.9999
    assert clip_together({}, 1.0) == {}


@pytest.mark.parametrize("bound", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("size", [1e37, 2.1e37, 3e38])
def test_gradients_that_a_server_made_huge_are_within_the_bound_too(size, bound):
    """Factors of 1e-40 and less are no longer precise in float32."""
    clipped = clip_together({"a": torch.full((1000, 1000), size)}, bound)
    assert clipped["a"].double().norm() <= bound
