"""The order of rows in one epoch. Shapes: n good rows, S shards, V streams, B rows of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.data.shards import ImageShards

RowIds = NDArray[np.int64]


class EpochOrder:
    """Which rows batch t of an epoch holds: a pure function of (seed, epoch, t), whatever the number of ranks.

    Shards are shuffled; the good rows in that order are cut into V streams, which are read in parallel, each nearly
    sequentially: rows move only inside windows. The epoch takes one row of each stream in turn. Memory does not grow
    with n: a row id is computed from its place in the epoch.

    Ten good rows, three streams, windows of two: the streams hold the rows 0-3, 4-6 and 7-9 of the shuffled shards, so
    positions 0-3, 0-2 and 0-2. Place 7 of the epoch is of stream 7 % 3 = 1, position 7 // 3 = 2, thus in window 1 of
    that stream, which has position 2 alone: row 4 + 2 = 6. Place 4 is of stream 1, position 1, in window 0, whose
    shuffle puts 0 or 1 there: row 4 or 5. A batch is a run of places; of two ranks, one serves streams 0 and 2.

    Args:
        bad: rows that do not decode, sorted row ids; they appear in no batch.
    """

    def __init__(
        self, shards: ImageShards, bad: RowIds, *, seed: int, epoch: int, streams: int = 128, window: int = 1024
    ) -> None:
        for name, value in (("streams", streams), ("window", window)):
            if value < 1:
                raise ValueError(f"order.{name} must be at least 1, got {value}")
        bad = np.asarray(bad, dtype=np.int64)
        if len(bad) and (np.any(np.diff(bad) <= 0) or bad[0] < 0 or bad[-1] >= len(shards)):
            raise ValueError(f"order.bad must be sorted, distinct row ids below {len(shards)}")
        self.seed, self.epoch, self.window = seed, epoch, window
        self.num_rows = len(shards) - len(bad)
        self.streams = max(1, min(streams, self.num_rows))
        self._bad_shift = bad - np.arange(len(bad))  # good row g is row id g + how many of these are <= g
        good_starts = shards.starts - np.searchsorted(bad, shards.starts)  # (S + 1,) in good rows
        shuffled = permutation(len(shards.shards), Purpose.SHARD_ORDER, seed, epoch)
        self._shard_good = good_starts[:-1][shuffled]  # first good row of each shard, in the epoch's order
        self._shard_starts = np.cumsum(np.concatenate([[0], np.diff(good_starts)[shuffled]]))[:-1]
        self._windows: dict[int, tuple[int, RowIds]] = {}  # the last window of each stream

    def batches(self, batch_size: int) -> int:
        """Number of batches: none is larger than `batch_size`, and they differ by at most one row."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return -(-self.num_rows // batch_size)

    def batch(self, t: int, batch_size: int, rank: int = 0, size: int = 1) -> RowIds:
        """Row ids of batch t, (B,), or those of them that lie in the streams of one of `size` ranks, perhaps none."""
        if not 0 <= rank < size:
            raise ValueError(f"rank must lie in 0..{size - 1}, got {rank}")
        places = self._places(t, batch_size)
        return self._rows(places[places % self.streams % size == rank])

    def of_ranks(self, t: int, batch_size: int, size: int) -> list[RowIds]:
        """What `batch` gives each of `size` ranks."""
        places = self._places(t, batch_size)
        rows, ranks = self._rows(places), places % self.streams % size
        return [rows[ranks == rank] for rank in range(size)]

    def _places(self, t: int, batch_size: int) -> RowIds:
        """Places of batch t in the epoch, (B,)."""
        steps = self.batches(batch_size)
        if not 0 <= t < steps:
            raise IndexError(f"batch {t} is outside 0..{steps - 1}")
        return np.arange(t * self.num_rows // steps, (t + 1) * self.num_rows // steps)

    def _rows(self, places: RowIds) -> RowIds:
        """Row ids at places of the epoch, (B,) from (B,)."""
        if len(places) == 0:
            return places
        position, stream = np.divmod(places, self.streams)  # the remainder of n falls to the first streams
        window, inside = np.divmod(position, self.window)
        pairs, group = np.unique(window * self.streams + stream, return_inverse=True)
        table = np.zeros((len(pairs), self.window), dtype=np.int64)
        for line, pair in zip(table, pairs.tolist(), strict=True):
            shuffled = self._shuffle(pair % self.streams, pair // self.streams)
            line[: len(shuffled)] = shuffled
        position = window * self.window + table[group, inside]
        shortest, longer = divmod(self.num_rows, self.streams)
        place = stream * shortest + np.minimum(stream, longer) + position  # in the good rows of the shuffled shards
        shard = np.searchsorted(self._shard_starts, place, side="right") - 1
        good = self._shard_good[shard] + place - self._shard_starts[shard]
        rows: RowIds = good + np.searchsorted(self._bad_shift, good, side="right")
        return rows

    def _shuffle(self, stream: int, window: int) -> RowIds:
        """The shuffle inside one window of a stream, (window,) or shorter at the stream's end."""
        known = self._windows.get(stream)
        if known is None or known[0] != window:
            shortest, longer = divmod(self.num_rows, self.streams)
            length = min(self.window, shortest + (stream < longer) - window * self.window)
            known = (window, permutation(length, Purpose.WINDOW_ORDER, self.seed, self.epoch, stream, window))
            self._windows[stream] = known
        return known[1]
