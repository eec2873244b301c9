"""Rows drawn by their place among all rows: the same ones on any number of ranks.

Shapes: n rows of this rank, m of them drawn, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.lowest import Cut, lowest
from grappa_dist.distributed.rows import Rows
from grappa_dist.distributed.scratch import scratch
from grappa_dist.distributed.sharded_rows import Share, join_rows
from grappa_dist.ops.hashing import HASH_BITS, RACE_BITS, WEIGHT_BITS, race_keys, row_hashes


@dataclass(frozen=True)
class Draw:
    """`num` good rows of all ranks: those with the lowest keys, which are hashes of (key, place among all rows)."""

    share: Share
    groups: Tensor  # (n,) int32, 0 for rows that may be drawn, else -1
    keys: Tensor  # (n,) int64
    cut: Cut

    @staticmethod
    def of(share: Share, num: int, *key: int, weights: Tensor | None = None) -> Draw:
        """All of them alike; or without replacement by `weights` (n,) int64, of which those of 0 are never drawn."""
        groups = scratch((len(share.rows),), torch.int32).fill_(-1)
        keys = scratch((len(share.rows),), torch.int64)
        shift = 0 if weights is None else _shift(share, weights)
        for positions in share.good_positions():
            hashes = row_hashes(positions + share.first, *key)
            if weights is None:
                groups[positions], keys[positions] = 0, hashes
            else:
                groups[positions] = torch.where(weights[positions] > 0, 0, -1).int()
                keys[positions] = race_keys(hashes, weights[positions], shift)
        bits = HASH_BITS if weights is None else RACE_BITS
        return Draw(share, groups, keys, lowest(share, groups, keys, torch.tensor([num]), bits=bits))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (P,) of this rank's, ascending, and grid rows (P, D) on the device."""
        return ((positions, self.share.read(positions)) for positions in self.positions())

    def positions(self) -> Iterator[Tensor]:
        """Of this rank's, ascending, block by block; no row is read."""
        for positions in self.share.good_positions():
            taken = self.cut.takes(self.groups[positions], self.keys[positions], positions + self.share.first)
            yield from positions[taken].split(self.share.block_rows) if bool(taken.any()) else ()

    def __len__(self) -> int:
        return sum(map(len, self.positions()))


def _shift(share: Share, weights: Tensor) -> int:
    """Bits that the largest weight of all ranks has too many for a race."""
    own = weights.max() if len(weights) else torch.tensor(0)
    largest = int(torch.cat(share.gather(own[None])).max())
    return max(0, largest.bit_length() - WEIGHT_BITS)


def sampled_share(share: Share, num: int, *key: int) -> Share:
    """A share of `num` drawn rows, each with the rank that holds it; all of them when there are no more.

    The rows are copied, so that passes over them read nothing else: 4 m D bytes outside of the process's own memory.
    """
    if num >= share.num_good:
        return share
    draw = Draw.of(share, num, *key)
    return copied_share(share, draw.positions(), len(draw))


def copied_share(share: Share, positions: Iterable[Tensor], num: int) -> Share:
    """A share of `num` of these rows, by ascending positions (P,) piece by piece; copied as `sampled_share` does."""
    rows = scratch((num, share.dim), torch.float32)
    first = 0
    for x in share.each(share.read, positions):
        rows[first : first + len(x)] = x.cpu()
        first += len(x)
    copy = Rows([rows.numpy()], [np.ones(num, dtype=bool)], ["the sample"])
    return join_rows(
        share.comm, copy, block_rows=share.block_rows, device=share.device, stop_requested=share.stop_requested
    )
