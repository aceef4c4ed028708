"""The pool reuses memory, and never memory that someone still holds."""

from __future__ import annotations

import torch

from fedsea.wire.buffers import BufferPool

SHAPE = (512, 256)


def test_memory_is_used_again_once_the_tensor_died() -> None:
    pool = BufferPool()
    tensor = pool.empty(SHAPE)
    address = tensor.data_ptr()
    del tensor
    assert pool.empty(SHAPE).data_ptr() == address


def test_memory_of_a_living_tensor_is_left_alone() -> None:
    pool = BufferPool()
    first = pool.empty(SHAPE).zero_()
    second = pool.empty(SHAPE).fill_(1.0)
    assert float(first.abs().max()) == 0.0
    assert second.data_ptr() != first.data_ptr()


def test_a_view_keeps_its_memory() -> None:
    pool = BufferPool()
    view = pool.empty(SHAPE).zero_()[3:5].t()
    pool.empty(SHAPE).fill_(1.0)
    assert float(view.abs().max()) == 0.0


def test_an_autograd_graph_keeps_its_memory() -> None:
    pool = BufferPool()
    weight = torch.ones(SHAPE, requires_grad=True)
    loss = (weight * pool.empty(SHAPE).fill_(2.0)).sum()
    pool.empty(SHAPE).fill_(9.0)
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full(SHAPE, 2.0))


def test_tensors_are_aligned_for_reproducible_products() -> None:
    pool = BufferPool()
    held = [pool.empty((rows, 257)) for rows in (1, 3, 64, 65, 300, 1000)]
    assert [tensor.data_ptr() % 64 for tensor in held] == [0] * len(held)


def test_unused_memory_is_bounded() -> None:
    pool = BufferPool()
    held = [pool.empty(SHAPE) for _ in range(20)]
    del held
    pool.empty(SHAPE)
    assert pool.num_bytes <= 6 * 4 * 512 * 256


def test_sizes_that_differ_a_little_share_a_buffer() -> None:
    pool = BufferPool()
    for rows in range(500, 512):
        pool.empty((rows, 256))
    assert pool.num_bytes < 2 * 4 * 512 * 256
