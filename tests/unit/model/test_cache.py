"""Memory of keys and values: never more than the bound, and given back when nobody needs it."""

from __future__ import annotations

import random

import psutil
import pytest
import torch

from fedsea.errors import CapacityError
from fedsea.model.cache import CacheArena
from fedsea.model.slabs import capacity_for, pages_for

BLOCKS, HEADS, SIZE = 2, 2, 4
TOKEN_BYTES = 2 * BLOCKS * HEADS * SIZE * 4
PAGE_BYTES = 32 * TOKEN_BYTES
LIMIT = 200 * PAGE_BYTES


def bounded(limit=LIMIT):
    arena = CacheArena(BLOCKS)
    arena.bound(TOKEN_BYTES, limit)
    return arena


def fill(cache):
    """Its first token, so that the memory is made."""
    part = torch.ones(HEADS, 1, SIZE)
    for block in range(BLOCKS):
        cache.write(block, part, part)
    cache.length = 1


def made_bytes(caches):
    """What was really allocated for these sequences."""
    return sum(slab.num_bytes for slab in {id(cache.slab): cache.slab for cache in caches}.values())


@pytest.mark.parametrize("seed", range(5))
def test_memory_is_never_more_than_the_bound_and_all_of_it_comes_back(seed):
    draw, arena, caches, refused = random.Random(seed), bounded(), [], 0
    for _ in range(600):
        if caches and draw.random() < 0.45:
            caches.pop(draw.randrange(len(caches))).close()
        else:
            tokens = draw.choice((1, 20, 60, 200, 900))
            room = arena.room_for(capacity_for(tokens))
            try:
                caches.append(arena.open(tokens))
            except CapacityError:
                assert room == 0
                refused += 1
            else:
                assert room > 0
                assert arena.room_for(capacity_for(tokens)) == room - 1
                if draw.random() < 0.7:
                    fill(caches[-1])
        assert arena.pages * PAGE_BYTES <= arena.num_bytes <= LIMIT
        assert made_bytes(caches) <= arena.num_bytes
    assert refused
    for cache in caches:
        cache.close()
    assert (arena.pages, arena.num_bytes) == (0, 0)


def test_slab_that_was_not_written_to_yet_counts_in_full():
    arena = bounded()
    cache = arena.open(32)
    assert arena.num_bytes == cache.slab.num_slots * PAGE_BYTES
    before = arena.num_bytes
    fill(cache)
    assert arena.num_bytes == cache.slab.num_bytes == before


def test_slab_is_a_sixteenth_of_the_memory_or_one_sequence():
    arena = bounded()
    assert [arena.open(tokens).slab.num_slots for tokens in (32, 64, 128, 256, 512)] == [12, 6, 3, 1, 1]
    assert bounded(1 << 30).open(32).slab.num_slots == 16


def test_whole_memory_can_be_used_whatever_the_size_of_a_slab():
    arena = bounded(7 * PAGE_BYTES * 4)
    caches = [arena.open(128) for _ in range(7)]
    assert arena.num_bytes == 7 * PAGE_BYTES * pages_for(128)
    with pytest.raises(CapacityError, match="full at the moment") as raised:
        arena.open(128)
    assert raised.value.retry_after_s > 0
    caches[0].close()
    arena.open(128)


def test_partly_empty_slab_counts_until_its_last_sequence_is_closed():
    arena = bounded()
    caches = [arena.open(32) for _ in range(12)]
    for cache in caches[1:]:
        cache.close()
    assert arena.num_bytes == 12 * PAGE_BYTES
    caches[0].close()
    assert arena.num_bytes == 0


def test_memory_is_gone_with_the_last_sequence_even_if_somebody_still_holds_a_closed_one():
    arena = bounded()
    cache = arena.open(32)
    fill(cache)
    cache.close()
    assert cache.slab.num_bytes == 0


def test_operating_system_has_memory_only_as_it_is_written_and_has_it_back_at_once():
    arena, process, megabytes = CacheArena(1), psutil.Process(), 1 << 20
    part = torch.ones(16, 1, 256)
    before = process.memory_info().rss
    cache = arena.open(4096)
    cache.write(0, part, part)
    assert arena.num_bytes == 128 * megabytes
    assert process.memory_info().rss - before < 16 * megabytes
    whole = torch.ones(1, 1, 1).expand(16, 4096, 256)
    cache.write(0, whole, whole)
    full = process.memory_info().rss
    assert full - before > 96 * megabytes
    cache.close()
    assert full - process.memory_info().rss > 96 * megabytes


def test_new_sequences_go_where_fewest_places_are_free():
    arena = bounded()
    first = [arena.open(32) for _ in range(12)]
    second = [arena.open(32) for _ in range(12)]
    for cache in (*first[:6], *second[:2]):
        cache.close()
    assert {id(arena.open(32).slab) for _ in range(2)} == {id(second[0].slab)}


def test_short_sequence_has_the_place_of_a_longer_one_where_no_memory_is_left():
    arena = bounded(32 * 2 * PAGE_BYTES)
    longer = [arena.open(64) for _ in range(32)]
    slab = longer[0].slab
    assert slab.num_slots == 2
    longer[0].close()
    assert arena.open(32).slab is slab
    with pytest.raises(CapacityError):
        arena.open(32)
