"""The training stream: packed, complete, shuffled, and exactly resumable; the held-out split."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsea.data import BatchStream, evaluation_batches
from fedsea.data.shuffling import hash64, heldout_mask, shuffled
from fedsea.errors import ConfigError, DataError
from fedsea.types import IGNORE

# Short rows, rows that become several pieces, and one with nothing to learn.
ROWS = [{"text": f"{i:02d}" + "x" * (i % 7) * 5} for i in range(20)] + [{"text": " "}]


def sequences_of(batch):
    return [tuple(part.tolist()) for part in batch.input_ids_T.split(batch.lengths)]


def take(stream, count):
    return [[tensor.tolist() for tensor in (b.input_ids_T, b.targets_T)] for b in (stream.next() for _ in range(count))]


def test_a_batch_is_packed_with_shifted_targets(silo, tokenizer):
    batch = BatchStream(silo([{"prompt": "ab", "completion": "cd"}]), seed=0, sequences_per_batch=2).next()
    ids = tokenizer("abcd")["input_ids"] + [tokenizer.eos_token_id]
    assert batch.lengths == (6, 6)
    assert batch.input_ids_T.tolist() == ids * 2
    assert batch.targets_T.tolist() == [IGNORE, IGNORE, *ids[3:], IGNORE] * 2
    assert batch.input_ids_T.dtype == batch.targets_T.dtype == torch.int64
    assert batch.num_target_tokens == 6


@pytest.mark.parametrize("sequences_per_batch", [1, 3, 64])
def test_every_epoch_gives_every_sequence_once_in_another_order(silo, sequences_per_batch):
    opened = silo(ROWS, max_tokens=12)
    wanted = sorted(tuple(s.ids.tolist()) for s in opened.train())
    stream = BatchStream(opened, seed=3, sequences_per_batch=sequences_per_batch)
    flat = [s for _ in range(-(-2 * len(wanted) // sequences_per_batch)) for s in sequences_of(stream.next())]
    first, second = flat[: len(wanted)], flat[len(wanted) : 2 * len(wanted)]
    assert sorted(first) == sorted(second) == wanted
    assert first != second


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 30), size=st.integers(1, 9), seed=st.integers(0, 2**31 - 1))
def test_a_stream_goes_on_exactly_from_its_saved_state(silo, before, size, seed):
    running = BatchStream(silo(ROWS, max_tokens=12, holdout=0.2), seed=seed, sequences_per_batch=size)
    take(running, before)
    state = json.loads(json.dumps(running.state()))
    restarted = BatchStream(silo(ROWS, max_tokens=12, holdout=0.2), seed=seed, sequences_per_batch=size)
    restarted.restore(state)
    assert take(restarted, 6) == take(running, 6)
    assert restarted.state() == running.state()


def test_the_stream_is_the_same_with_and_without_a_cache_and_stays_within_it(silo, monkeypatch):
    monkeypatch.setattr("fedsea.data.silo.CHUNK_ROWS", 4)
    wanted = take(BatchStream(silo(ROWS, max_tokens=12), seed=1, sequences_per_batch=4), 40)
    monkeypatch.setattr("fedsea.data.silo.CACHE_BYTES", 3000)
    opened = silo(ROWS, max_tokens=12)
    assert take(BatchStream(opened, seed=1, sequences_per_batch=4), 40) == wanted
    assert opened._cache_bytes == sum(row.num_bytes for row in opened._cache.values()) <= 3000


def test_seeds_give_other_orders(silo):
    opened = silo(ROWS)
    streams = [BatchStream(opened, seed=seed, sequences_per_batch=20) for seed in (0, 1)]
    assert take(streams[0], 1) != take(streams[1], 1)


def test_a_state_of_other_data_seed_or_settings_is_refused(silo):
    stream = BatchStream(silo(ROWS), seed=0, sequences_per_batch=2)
    others = [
        BatchStream(silo(ROWS[:-1]), seed=0, sequences_per_batch=2),
        BatchStream(silo(ROWS, max_tokens=12), seed=0, sequences_per_batch=2),
        BatchStream(silo(ROWS, seed=1), seed=0, sequences_per_batch=2),
        BatchStream(silo(ROWS), seed=1, sequences_per_batch=2),
    ]
    for other in others:
        with pytest.raises(DataError, match="belongs to other data"):
            other.restore(stream.state())


@pytest.mark.parametrize("change", [{"version": 9}, {"row": -1}, {"row": 10**6}, {"extra": 1}])
def test_a_damaged_state_is_refused(silo, change):
    stream = BatchStream(silo(ROWS), seed=0, sequences_per_batch=2)
    with pytest.raises(DataError, match="damaged"):
        stream.restore(stream.state() | change)


def test_held_out_and_training_rows_share_nothing_and_are_everything(silo):
    opened = silo(ROWS, holdout=0.3)
    train, heldout = set(opened.train().rows.tolist()), set(opened.heldout().rows.tolist())
    assert not train & heldout
    assert train | heldout == set(range(len(ROWS)))
    assert (opened.num_train, opened.num_heldout, opened.num_rows) == (len(train), len(heldout), len(ROWS))


def test_training_batches_hold_no_held_out_sequence(silo):
    opened = silo(ROWS, holdout=0.3)
    hidden = {tuple(s.ids.tolist()) for s in opened.heldout()}
    stream = BatchStream(opened, seed=0, sequences_per_batch=8)
    assert hidden.isdisjoint(s for _ in range(10) for s in sequences_of(stream.next()))


@given(num_rows=st.integers(2, 50), share=st.floats(1e-9, 1 - 1e-9), seed=st.integers(0, 2**31 - 1))
def test_a_split_leaves_a_row_on_both_sides(num_rows, share, seed):
    assert 1 <= heldout_mask(num_rows, share, seed).sum() < num_rows


def test_the_held_out_share_is_kept_in_large_silos():
    assert abs(heldout_mask(100_000, 0.1, 7).mean() - 0.1) < 0.005


def test_nothing_is_held_out_of_a_single_row_or_with_share_zero(silo):
    assert silo([{"text": "a"}], holdout=0.5).num_train == 1
    assert silo(ROWS, holdout=0.0).num_heldout == 0


def test_evaluation_gives_the_held_out_split_once_in_order(silo):
    opened = silo(ROWS, holdout=0.4, max_tokens=12)
    wanted = [tuple(s.ids.tolist()) for s in opened.heldout()]
    batches = list(evaluation_batches(opened, sequences_per_batch=3, max_sequences=None))
    assert [s for batch in batches for s in sequences_of(batch)] == wanted
    assert {len(batch.lengths) for batch in batches[:-1]} == {3}
    some = list(evaluation_batches(opened, sequences_per_batch=3, max_sequences=4))
    assert [len(batch.lengths) for batch in some] == [3, 1]


def test_batches_of_no_sequence_are_refused(silo):
    with pytest.raises(ConfigError, match="sequences_per_batch"):
        BatchStream(silo(ROWS), seed=0, sequences_per_batch=0)


def test_large_parquet_files_are_read_a_row_group_at_a_time(silo, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsea.data.parquet_files._KEEP_BYTES", 100)
    monkeypatch.setattr("fedsea.data.silo.CACHE_BYTES", 0)
    pq.write_table(pa.table({"text": [f"{i:03d}" for i in range(60)]}), tmp_path / "in.parquet", row_group_size=10)
    opened = silo((tmp_path / "in.parquet").read_bytes(), "s.parquet")
    epoch = sequences_of(BatchStream(opened, seed=1, sequences_per_batch=60).next())
    assert len(set(epoch)) == 60
    order = shuffled(opened.train().rows, 1, 0, blocks=opened.index.blocks)
    groups = [int(row) // 10 for row in order]
    assert [g for i, g in enumerate(groups) if not i or groups[i - 1] != g] != sorted(set(groups))
    assert sum(a != b for a, b in pairwise(groups)) == 5


def test_the_hash_is_the_published_one_and_never_changes():
    # The first two outputs of SplitMix64 with seed 0, as its reference code gives them.
    assert hash64(np.array([1, 2], np.int64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert shuffled(np.arange(8), 1, 2).tolist() == [3, 4, 2, 6, 7, 0, 1, 5]
