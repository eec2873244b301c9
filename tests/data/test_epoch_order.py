"""The order of an epoch: every good row once, the same on any number of ranks."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.epoch_order import EpochOrder
from grappa_dist.data.index import ROW, Shard
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_tar


def shards_of(*sizes: int) -> ImageShards:
    shards = tuple(Shard(f"{i}.tar", f"/nowhere/{i}.tar", rows, 0, str(i)) for i, rows in enumerate(sizes))
    return ImageShards(shards, tuple(np.zeros(rows, dtype=ROW) for rows in sizes))


def epoch_of(order: EpochOrder, batch_size: int) -> list[int]:
    return [row for t in range(order.batches(batch_size)) for row in order.batch(t, batch_size).tolist()]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    streams=st.integers(1, 20),
    window=st.integers(1, 16),
    batch_size=st.integers(1, 70),
    ranks=st.integers(1, 7),
    data=st.data(),
)
def test_every_good_row_appears_once_an_epoch_and_ranks_partition_its_batches(
    sizes: list[int], streams: int, window: int, batch_size: int, ranks: int, data: st.DataObject
) -> None:
    num_rows = sum(sizes)
    bad = np.array(sorted(data.draw(st.sets(st.integers(0, num_rows - 1)))) if num_rows else [], dtype=np.int64)
    order = EpochOrder(shards_of(*sizes), bad, seed=3, epoch=1, streams=streams, window=window)
    assert sorted(epoch_of(order, batch_size)) == sorted(set(range(num_rows)) - set(bad.tolist()))
    batches = [order.batch(t, batch_size) for t in range(order.batches(batch_size))]
    lengths = [len(batch) for batch in batches] or [0]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= batch_size
    for t, batch in enumerate(batches):
        shares = [order.batch(t, batch_size, rank, ranks).tolist() for rank in range(ranks)]
        assert sorted(row for share in shares for row in share) == sorted(batch.tolist())
        assert [of_rank.tolist() for of_rank in order.of_ranks(t, batch_size, ranks)] == shares


def test_the_example_of_the_docstring_holds() -> None:
    order = EpochOrder(shards_of(10), np.array([], dtype=np.int64), seed=0, epoch=0, streams=3, window=2)
    rows = order.batch(0, 10).tolist()
    assert rows[7] == 6
    assert rows[4] in (4, 5)
    assert [set(rows[stream::3]) for stream in range(3)] == [{0, 1, 2, 3}, {4, 5, 6}, {7, 8, 9}]
    assert sorted(order.batch(0, 10, 0, 2).tolist()) == [0, 1, 2, 3, 7, 8, 9]


def test_a_batch_does_not_depend_on_the_batches_drawn_before_it() -> None:
    shards, bad = shards_of(50, 0, 1, 200), np.array([3, 60])
    read_through = EpochOrder(shards, bad, seed=1, epoch=2, streams=8, window=16)
    whole = [read_through.batch(t, 30) for t in range(read_through.batches(30))]
    for t in reversed(range(len(whole))):
        resumed = EpochOrder(shards, bad, seed=1, epoch=2, streams=8, window=16)
        assert np.array_equal(resumed.batch(t, 30), whole[t])
        assert np.array_equal(read_through.batch(t, 30), whole[t])


def test_an_epoch_resumed_on_other_numbers_of_ranks_reads_exactly_the_rows_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard, rows in enumerate((50, 0, 1, 200)):
        write_tar(tmp_path / f"{shard}.tar", {f"{row:04d}.jpg": b"%d/%d" % (shard, row) for row in range(rows)})
    read: list[bytes] = []
    images = ImageShards.images

    def recorded(self: ImageShards, rows: Sequence[int]) -> Iterator[bytes | BadImage]:
        for data in images(self, rows):
            read.append(data if isinstance(data, bytes) else b"")
            yield data

    monkeypatch.setattr(ImageShards, "images", recorded)
    of_parts: list[set[bytes]] = []
    for ranks, steps in ((3, range(4)), (1, range(4, 6)), (2, range(6, 9))):
        read.clear()
        for rank in range(ranks):  # each opens the shards and the order anew, as a process does
            shards = ImageShards.open([tmp_path], tmp_path / "index")
            order = EpochOrder(shards, np.array([3, 60]), seed=1, epoch=2, streams=8, window=16)
            assert order.batches(30) == 9
            for t in steps:
                list(shards.images(order.batch(t, 30, rank, ranks).tolist()))
        of_parts.append(set(read))
        assert len(read) == len(of_parts[-1])  # none twice
    good = {b"%d/%d" % shards.locate(row) for row in range(251)} - {b"%d/%d" % shards.locate(row) for row in (3, 60)}
    assert set.union(*of_parts) == good
    assert sum(map(len, of_parts)) == len(good)


def test_a_rank_reads_its_own_streams_only_and_each_nearly_in_order() -> None:
    shards = shards_of(1024, 1024)
    order = EpochOrder(shards, np.array([], dtype=np.int64), seed=0, epoch=0, streams=4, window=32)
    share = np.concatenate([order.batch(t, 64, rank=1, size=2) for t in range(order.batches(64))])
    assert len(share) == 1024
    runs = [share[0::2], share[1::2]]  # its two streams take turns
    for run in runs:
        assert run.max() - run.min() == 511
        assert np.abs(run - np.arange(512) - run.min()).max() < 32


def test_seeds_and_epochs_give_other_orders() -> None:
    shards, none = shards_of(64, 64, 64), np.array([], dtype=np.int64)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0)]
    orders = [tuple(epoch_of(EpochOrder(shards, none, seed=s, epoch=e, streams=4), 16)) for s, e in keys]
    assert len(set(orders)) == len(keys)


def test_an_epoch_of_one_row_and_of_none() -> None:
    none = np.array([], dtype=np.int64)
    one = EpochOrder(shards_of(0, 1, 0), none, seed=0, epoch=0)
    assert one.batches(256) == 1
    assert one.batch(0, 256).tolist() == [0]
    assert [len(one.batch(0, 256, rank, 3)) for rank in range(3)] == [1, 0, 0]
    empty = EpochOrder(shards_of(2), np.array([0, 1]), seed=0, epoch=0)
    assert empty.batches(4) == 0
    with pytest.raises(IndexError, match="batch 0"):
        empty.batch(0, 4)


def test_an_order_travels_to_another_process() -> None:
    order = EpochOrder(shards_of(30, 5), np.array([7]), seed=0, epoch=0, streams=3, window=4)
    first = order.batch(0, 10)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).batch(0, 10), first)


def test_a_billion_rows_cost_no_more_than_a_thousand() -> None:
    sizes = [10_000_000] * 100
    shards = ImageShards(tuple(Shard(str(i), str(i), rows, 0, str(i)) for i, rows in enumerate(sizes)), ())
    order = EpochOrder(shards, np.array([5, 999_999_999]), seed=0, epoch=0)
    batch = order.batch(order.batches(4096) - 1, 4096)
    assert len(set(batch.tolist())) == len(batch)
    assert 0 <= batch.min() <= batch.max() < 10**9


def test_wrong_settings_are_refused_by_name() -> None:
    shards = shards_of(5)
    with pytest.raises(ValueError, match="streams must be at least 1, got 0"):
        EpochOrder(shards, np.array([], dtype=np.int64), seed=0, epoch=0, streams=0)
    for bad in ([3, 1], [1, 1], [5], [-1]):
        with pytest.raises(ValueError, match="bad must be sorted"):
            EpochOrder(shards, np.array(bad), seed=0, epoch=0)
    with pytest.raises(ValueError, match="got -1"):
        EpochOrder(shards, np.array([], dtype=np.int64), seed=-1, epoch=0)
    with pytest.raises(ValueError, match="rank"):
        EpochOrder(shards, np.array([], dtype=np.int64), seed=0, epoch=0).batch(0, 2, 2, 2)


def batch_of_rows(order: EpochOrder, batch_size: int) -> np.ndarray:
    """Which batch of the epoch each row is in, (n,)."""
    found = np.empty(order.num_rows, dtype=np.int64)
    for t in range(order.batches(batch_size)):
        found[order.batch(t, batch_size)] = t
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_is_as_good_as_a_full_shuffle_at_the_default_settings(seed: int) -> None:
    shards, none, size = shards_of(*[1024] * 64), np.array([], dtype=np.int64), 128
    chance = size / len(shards)  # that two rows are in one batch
    orders = [EpochOrder(shards, none, seed=seed, epoch=epoch) for epoch in (0, 1)]
    place = np.argsort(epoch_of(orders[0], size))
    assert abs(np.corrcoef(np.arange(len(place)), place)[0, 1]) < 0.03  # rank correlation with the stored order
    first, second = (batch_of_rows(order, size) for order in orders)
    assert (first[1:] == first[:-1]).mean() < 1.5 * chance  # rows stored side by side
    shards_in_batch = [len(np.unique(orders[0].batch(t, size) // 1024)) for t in range(8)]
    assert np.mean(shards_in_batch) > 0.9 * 64 * (1 - (1 - 1 / 64) ** size)  # what chance gives
    both = np.unique(np.stack([first, second]), axis=1, return_counts=True)[1]
    assert (both * (both - 1)).sum() / (len(shards) * size) == pytest.approx(chance, rel=0.1)  # together once more


def test_one_stream_and_a_small_window_are_no_shuffle() -> None:
    shards, none = shards_of(*[1024] * 64), np.array([], dtype=np.int64)
    near = batch_of_rows(EpochOrder(shards, none, seed=0, epoch=0, streams=1, window=256), 128)
    assert (near[1:] == near[:-1]).mean() > 100 * 128 / len(shards)
