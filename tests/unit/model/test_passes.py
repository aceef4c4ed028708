"""Passes of one trunk do not disturb each other."""

from __future__ import annotations

import pytest
import torch

from fedsea.model import adapters
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.decoding import TrunkDecoder, Turn
from fedsea.model.loading import load_trunk
from fedsea.model.passes import Entry, TrunkPasses
from fedsea.plan import AdapterSection
from fedsea.types import BlockRange
from tests.support.decoding import family_checkpoint

BLOCKS = BlockRange(1, 4)


def _nothing(passes, hidden, gradient):
    pass


def _decode(passes, hidden, gradient):
    decoder = TrunkDecoder(passes.trunk)
    memory = decoder.open(1, 8, BLOCKS, passes.trunk.freeze())
    (output,) = decoder.run([Turn(memory, (0,), (7,), (), hidden)])
    assert isinstance(output, torch.Tensor)
    memory.close()


def _evaluate(passes, hidden, gradient):
    passes.evaluate(Entry("b", hidden, (7,), BLOCKS, needs_gradient=False))


def _pull_back(passes, hidden, gradient):
    passes.pull_back(Entry("b", hidden, (7,), BLOCKS, needs_gradient=True), gradient)


def _gradients(folder, between):
    trunk = load_trunk(open_checkpoint(str(folder)), BLOCKS, dtype=torch.float32, activation_checkpointing=True)
    adapters.attach(trunk, AdapterSection(rank=4, dropout=0.3), "adapter", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trainable(trunk).values():
            parameter.normal_(0, 0.2, generator=generator)
    passes = TrunkPasses(trunk, 0, 9999, trains=True)
    hidden, gradient = torch.randn(2, 7, trunk.hidden_size, generator=generator)
    passes.forward(0, 0, [Entry("a", hidden, (7,), BLOCKS, needs_gradient=True)])
    between(passes, hidden, gradient)
    at_input = passes.backward(0, {"a": gradient})["a"]
    return {name: parameter.grad for name, parameter in adapters.trainable(trunk).items()} | {"input": at_input}


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_gradients_are_the_same_whatever_ran_between_forward_and_backward(family, tmp_path):
    folder = family_checkpoint(tmp_path, family)
    expected = _gradients(folder, _nothing)
    assert all(gradient is not None for gradient in expected.values())
    for between in (_decode, _evaluate, _pull_back):
        got = _gradients(folder, between)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected), between.__name__
