"""Segments that keep keys and values give the whole model's logits, for many families, lengths and cuts."""

from __future__ import annotations

import pytest
import torch

from fedsea.errors import CapacityError, ConfigError
from fedsea.model import adapters
from fedsea.model.cache import Extension
from fedsea.model.checkpoint import open_checkpoint
from fedsea.model.loading import load_input_blocks, load_output_blocks, load_trunk
from fedsea.model.trunk import CachedPart
from fedsea.plan import AdapterSection
from fedsea.types import BlockRange, Partition
from tests.parity.test_model_parity import NAMED, OTHERS

F32 = torch.float32
CUTS = (Partition(1, 2), Partition(3, 1), Partition(0, 0))
LENGTHS = (13, 6, 9)
STEPS = ((5, 1, 3), (1, 1, 1), (3, 2, 1), (1, 1, 1), (3, 1, 3))
"""New tokens of each sequence at each step; windows of 4 tokens are passed inside steps and between them."""
LEAN = {"llama", "mistral", "qwen2", "qwen3"}
REFUSED = {
    "diffllama": "its blocks attend twice, with values of their own",
    "bloom": "adds its positions to a mask of its own",
    "falcon_alibi": "adds its positions to a mask of its own",
    "stablelm": "its attention cannot be replaced",
}


class Client:
    """One sequence, its cut, and the caches of its three segments."""

    def __init__(self, checkpoint, trunk, cut, ids):
        self.ids, self.cut, self.done = ids, cut, 0
        self.input_blocks = load_input_blocks(checkpoint, cut, dtype=F32)
        self.output_blocks = load_output_blocks(checkpoint, cut, dtype=F32)
        self.range = cut.trunk(checkpoint.num_blocks)
        self.caches = [segment.open_cache(16) for segment in (self.input_blocks, trunk, self.output_blocks)]

    def enter(self, new):
        extension = Extension((new,), (self.caches[0],))
        hidden = self.input_blocks.extend(self.ids[self.done : self.done + new], extension, self.input_blocks.freeze())
        extension.commit()
        return CachedPart(hidden, Extension((new,), (self.caches[1],)), self.range)

    def leave(self, hidden):
        extension = Extension((len(hidden),), (self.caches[2],))
        logits = self.output_blocks.extend(hidden, extension, self.output_blocks.freeze(), torch.arange(len(hidden)))
        extension.commit()
        self.done += len(hidden)
        return logits

    def rollback(self, length):
        self.done = length
        for cache in self.caches:
            cache.rollback(length)


def _setup(zoo, name, folder):
    model_type, settings = {**NAMED, **OTHERS}[name]
    central = zoo.save(zoo.config(model_type, **settings), folder)
    checkpoint = open_checkpoint(str(folder))
    trunk = load_trunk(checkpoint, BlockRange(0, checkpoint.num_blocks), dtype=F32)
    ids = zoo.batch(LENGTHS)[0].split(LENGTHS)
    with torch.no_grad():
        expected = [central.model(part[None]).logits[0].float() for part in ids]
    return checkpoint, trunk, ids, expected


def _together(trunk, clients, news):
    parts = [client.enter(new) for client, new in zip(clients, news, strict=True)]
    out = trunk.extend_group(parts, trunk.freeze())
    for part in parts:
        part.extension.commit()
    return [client.leave(hidden) for client, hidden in zip(clients, out, strict=True)]


@pytest.mark.parametrize("name", sorted({**NAMED, **OTHERS}.keys() - REFUSED))
def test_sequences_of_any_length_and_cut_decode_together_as_the_whole_model_does(name, zoo, tmp_path):
    checkpoint, trunk, ids, expected = _setup(zoo, name, tmp_path)
    assert trunk.lean is (NAMED.get(name, OTHERS.get(name))[0] in LEAN)
    clients = [Client(checkpoint, trunk, cut, part) for cut, part in zip(CUTS, ids, strict=True)]
    got = [[] for _ in clients]
    with torch.no_grad():
        for news in STEPS:
            for so_far, logits in zip(got, _together(trunk, clients, news), strict=True):
                so_far.append(logits)
        for so_far, client, wanted in zip(got, clients, expected, strict=True):
            assert client.done == len(wanted)
            torch.testing.assert_close(torch.cat(so_far), wanted, rtol=1e-4, atol=1e-5)
        # Back, and forth again with another step size.
        clients[0].rollback(4)
        again = [_together(trunk, clients[:1], (5,))[0], _together(trunk, clients[:1], (4,))[0]]
    torch.testing.assert_close(torch.cat(again), expected[0][4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_family_whose_blocks_need_more_than_keys_and_values_is_refused(name, zoo, tmp_path):
    model_type, settings = OTHERS[name]
    zoo.save(zoo.config(model_type, **settings), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot decode with a cache"):
        load_trunk(checkpoint, BlockRange(1, 6), dtype=F32).open_cache(8)


def test_failed_run_and_a_fork_leave_a_sequence_as_it_was(zoo, tmp_path):
    checkpoint, trunk, ids, expected = _setup(zoo, "llama_gqa", tmp_path)
    client = Client(checkpoint, trunk, CUTS[0], ids[0])
    with torch.no_grad():
        _together(trunk, [client], (4,))
        forks = [
            _copy(cache, segment)
            for cache, segment in zip(client.caches, (client.input_blocks, trunk, client.output_blocks), strict=True)
        ]
        with pytest.raises(ConfigError, match="5 tokens were announced"):
            trunk.extend_group(
                [CachedPart(torch.zeros(4, 32), Extension((5,), (client.caches[1],)), client.range)], trunk.freeze()
            )
        _together(trunk, [client], (6,))
        client.done, client.caches = 4, forks
        rest = _together(trunk, [client], (9,))[0]
    torch.testing.assert_close(rest, expected[0][4:], rtol=1e-4, atol=1e-5)


def test_sequence_longer_than_its_room_is_refused_before_anything_runs(zoo, tmp_path):
    _, trunk, *_ = _setup(zoo, "llama_gqa", tmp_path)
    cache = trunk.open_cache(20)
    assert cache.capacity == 32
    with pytest.raises(CapacityError, match="33 tokens and has room for 32"):
        Extension((33,), (cache,))
    assert trunk.arena.pages == 1
    cache.close()
    cache.close()
    assert trunk.arena.pages == 0
    assert trunk.arena.num_bytes == 0


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_sliding", "qwen2", "qwen3", "glm4"])
def test_adapters_frozen_before_training_goes_on_decode_as_they_were(name, zoo, tmp_path):
    _, trunk, *_ = _setup(zoo, name, tmp_path)
    settings = AdapterSection(rank=2, alpha=8.0)
    adapters.attach(trunk, settings, "adapter", 0)
    with torch.no_grad():
        for parameter in adapters.trainable(trunk).values():
            parameter.normal_(0, 0.2)
        hidden = torch.randn(9, 32)
        expected = trunk(hidden, (9,))
        frozen, changed = trunk.freeze(), {n: p.clone() for n, p in adapters.trainable(trunk).items()}
        for parameter in adapters.trainable(trunk).values():
            parameter.add_(1.0)
        live = {n: p.clone() for n, p in adapters.trainable(trunk).items()}
        for pieces in ((9,), (3, 1, 5)):
            cache, out = trunk.open_cache(9), []
            for piece in hidden.split(pieces):
                extension = Extension((len(piece),), (cache,))
                out += trunk.extend_group([CachedPart(piece, extension, trunk.range)], frozen)
                extension.commit()
            torch.testing.assert_close(torch.cat(out), expected, rtol=1e-4, atol=1e-4)
    for key, value in adapters.trainable(trunk).items():
        assert torch.equal(value, live[key])
        assert not torch.equal(value, changed[key])
    # Training still works on the very same parameters.
    trunk(hidden, (9,)).sum().backward()
    assert all(p.grad is not None for p in adapters.trainable(trunk).values())


def _copy(cache, segment):
    other = segment.open_cache(cache.capacity)
    other.take_over(cache)
    return other
