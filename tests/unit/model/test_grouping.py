"""Sequences of a batch are attended to in few calls, and each sees its own past alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from fedsea.model import grouping
from fedsea.model.cache import CacheArena, Extension
from fedsea.model.grouping import Way
from fedsea.model.lean_attention import attend

QUERIES, KEYS, SIZE = 4, 2, 8
SCALING = SIZE**-0.5
CPU = torch.device("cpu")


def _sequences(arena, lengths, closed=()):
    """Caches with random pasts; some slots are given back, so that they lie in between."""
    caches = []
    for length in lengths:
        cache = arena.open(64)
        keys, values = torch.randn(2, KEYS, length, SIZE)
        cache.write(0, keys, values)
        cache.length = length
        caches.append(cache)
    for number in closed:
        caches[number].close()
    return [cache for number, cache in enumerate(caches) if number not in closed]


def _attended(extension, queries, keys, values, window):
    """As `LeanBlocks` does it: in the way's order, and back."""
    way = Way(extension, CPU, token_bytes=2 * KEYS * SIZE * 4)
    order = torch.arange(len(queries)) if way.order_T is None else way.order_T
    mixed = []
    for group in way.groups:
        memories = group.write(0, keys[order][group.rows], values[order][group.rows])
        mixed += [attend(queries[order][run.rows], *run.of(memories), run, SCALING, window) for run in group.runs]
    out = torch.cat(mixed)
    return out if way.place_T is None else out.index_select(0, way.place_T)


def _alone(cache, new, queries, window):
    """One sequence, after its new keys were written."""
    memory_keys, memory_values = cache.slab.of(0, torch.empty(0), torch.empty(0))
    total = cache.length + new
    keys, values = (memory[cache.slot, :, :total] for memory in (memory_keys, memory_values))
    shared = QUERIES // KEYS
    at, seen = torch.arange(cache.length, total)[:, None], torch.arange(total)
    mask = seen <= at
    if window is not None:
        mask &= seen > at - window
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1),
        keys.repeat_interleave(shared, 0),
        values.repeat_interleave(shared, 0),
        attn_mask=mask,
        scale=SCALING,
    )
    return out.transpose(0, 1).reshape(new, -1)


@pytest.mark.parametrize("call_bytes", [0, 4096, 1 << 30], ids=["one by one", "some together", "all together"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("news", [(1, 1, 1, 1), (3, 3, 3, 3), (20, 20, 20, 20), (1, 3, 1, 2)], ids=str)
def test_every_sequence_sees_its_own_past_alone(news, window, call_bytes, monkeypatch):
    monkeypatch.setattr(grouping, "_CALL_BYTES", {"cpu": call_bytes})
    caches = _sequences(CacheArena(1), (9, 4, 17, 30, 12, 2), closed=(1, 3))
    caches = [caches[place] for place in (2, 0, 3, 1)]
    rows = sum(news)
    queries, keys, values = (
        torch.randn(rows, QUERIES, SIZE),
        torch.randn(rows, KEYS, SIZE),
        torch.randn(rows, KEYS, SIZE),
    )
    got = _attended(Extension(news, tuple(caches)), queries, keys, values, window)
    starts = [0, *itertools.accumulate(news)]
    for cache, (start, stop) in zip(caches, itertools.pairwise(starts), strict=True):
        expected = _alone(cache, stop - start, queries[start:stop], window)
        torch.testing.assert_close(got[start:stop], expected, rtol=1e-4, atol=1e-5)


def test_sequences_run_apart_where_together_would_cost_more(monkeypatch):
    token_bytes = 2 * KEYS * SIZE * 4
    caches = _sequences(CacheArena(1), (10, 11, 10, 50, 49))
    monkeypatch.setattr(grouping, "_CALL_BYTES", {"cpu": 20 * token_bytes})
    (group,) = Way(Extension((1,) * 5, tuple(caches)), CPU, token_bytes).groups
    assert [run.num_slots for run in group.runs] == [3, 2]
    assert [run.rows for run in group.runs] == [slice(0, 3), slice(3, 5)]


def test_equal_sequences_need_no_mask():
    caches = _sequences(CacheArena(1), (10, 10, 10))
    (group,) = Way(Extension((1,) * 3, tuple(caches)), CPU, 64).groups
    (run,) = group.runs
    assert run.bias(None) is None
    assert run.mask(None) == (None, False)
    assert run.bias(6) is not None
