"""Products with frozen weights give what `F.linear` gives, however they are computed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsea.model import products
from fedsea.model.products import Copies, FrozenLinear, Product

LARGE = (1280, 768)
"""Outputs and inputs of a weight that does not fit into a core's own cache."""


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), LARGE])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_the_linear_layers_for_any_number_of_rows(columns, shape, biased, dtype, monkeypatch):
    monkeypatch.setattr(products, "_likes_columns", lambda: columns)
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype) if biased else None
    plain, prepared = Product(weight, bias), Product(weight, bias)
    prepared.prepare(1)
    prepared.prepare(2)
    copied = dtype is torch.float32 and products._onednn() is not None
    assert (prepared._transposed_HO is not None) is (copied and columns)
    assert (prepared._packed is not None) is (copied and (shape == LARGE or not columns))
    for rows in (0, 1, 2, 7, 40):
        x = torch.randn(rows, shape[1], dtype=dtype)
        expected = F.linear(x, weight, bias)
        with torch.inference_mode():
            for product in (plain, prepared):
                torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("columns", [False, True])
def test_a_copy_for_several_rows_changes_nothing_for_one(columns, monkeypatch):
    monkeypatch.setattr(products, "_likes_columns", lambda: columns)
    weight, x = torch.randn(24, 16), torch.randn(1, 16)
    product = Product(weight, None)
    before = product(x)
    product.prepare(8)
    assert torch.equal(product(x), before)


def test_without_onednn_the_blas_does_it(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda: None)
    weight, x = torch.randn(LARGE), torch.randn(3, LARGE[1])
    product = Product(weight, None)
    product.prepare(1)
    product.prepare(3)
    for rows in (1, 3):
        assert torch.equal(product(x[:rows]), F.linear(x[:rows], weight))


def test_frozen_linear_keeps_leading_dimensions_and_knows_its_layer():
    linear = nn.Linear(16, 24, bias=False).requires_grad_(False)
    frozen = FrozenLinear(linear)
    for shape in ((1, 0, 16), (1, 1, 16), (2, 3, 16), (5, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(frozen(x), linear(x))
    assert frozen.is_of(linear)
    linear.weight.data = linear.weight.data.clone()
    assert not frozen.is_of(linear)


def test_layer_that_is_trained_or_is_no_plain_linear_layer_has_no_frozen_form():
    assert not FrozenLinear.serves(nn.Linear(4, 4))
    assert not FrozenLinear.serves(nn.Identity())
    assert not FrozenLinear.serves(None)
    assert FrozenLinear.serves(nn.Linear(4, 4).requires_grad_(False))


def test_weights_over_the_bound_are_held_once(monkeypatch):
    monkeypatch.setattr(products, "MOST_COPIED_BYTES", 100)
    monkeypatch.setattr(products, "_OWN_CACHE_BYTES", 10)
    monkeypatch.setattr(products, "_likes_columns", lambda: True)
    frozen = FrozenLinear(nn.Linear(16, 24).requires_grad_(False))
    for rows in (1, 3):
        frozen(torch.randn(rows, 16))
    assert frozen.product._packed is frozen.product._transposed_HO is None


def test_copies_of_a_process_are_bounded_together_and_given_back(monkeypatch):
    monkeypatch.setattr(products, "_likes_columns", lambda: True)
    gc.collect()  # what other tests left
    each = 2 * 4 * LARGE[0] * LARGE[1]
    monkeypatch.setattr(products, "MOST_COPIED_BYTES", sum(c._num_bytes for c in Copies._of_the_process) + 2 * each - 1)

    def owner() -> FrozenLinear:
        frozen = FrozenLinear(nn.Linear(LARGE[1], LARGE[0], bias=False).requires_grad_(False))
        for rows in (1, 3):
            frozen(torch.randn(rows, LARGE[1]))
        return frozen

    def copied(frozen: FrozenLinear) -> bool:
        return frozen.product._packed is not None and frozen.product._transposed_HO is not None

    first, second = owner(), owner()
    assert (copied(first), copied(second)) == (products._onednn() is not None, False)
    del first
    for rows in (1, 3):
        second(torch.randn(rows, LARGE[1]))
    assert copied(second) is (products._onednn() is not None)


def test_most_that_copies_take_leaves_out_who_has_none(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda: object())
    monkeypatch.setattr(products, "_likes_columns", lambda: True)
    monkeypatch.setattr(products, "MOST_COPIED_BYTES", 100)
    assert products.most_copied_bytes([10, 60, 20]) == 60
    assert products.most_copied_bytes([40, 30]) == 100
    monkeypatch.setattr(products, "_likes_columns", lambda: False)
    assert products.most_copied_bytes([10, 60, 20]) == 90
    monkeypatch.setattr(products, "_onednn", lambda: None)
    assert products.most_copied_bytes([10]) == 0
