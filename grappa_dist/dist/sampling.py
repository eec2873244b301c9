"""Rows drawn by their place among all rows: the same ones on any number of ranks.

Shapes: n rows of this rank, m of them drawn, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.dist.lowest import Cut, lowest
from grappa_dist.dist.scratch import scratch
from grappa_dist.dist.search import Rows
from grappa_dist.dist.share import Share, join_rows
from grappa_dist.ops.hashing import HASH_BITS, row_hashes


@dataclass(frozen=True)
class Draw:
    """`num` good rows of all ranks: those with the lowest hashes of (key, place among all rows)."""

    share: Share
    groups: Tensor  # (n,) int32, 0 for good rows, else -1
    hashes: Tensor  # (n,) int64
    cut: Cut

    @staticmethod
    def of(share: Share, num: int, *key: int) -> Draw:
        groups = scratch((len(share.rows),), torch.int32).fill_(-1)
        hashes = scratch((len(share.rows),), torch.int64)
        for positions in share.good_positions():
            groups[positions] = 0
            hashes[positions] = row_hashes(positions + share.first, *key)
        cut = lowest(share, groups, hashes, torch.tensor([num]), bits=HASH_BITS)
        return Draw(share, groups, hashes, cut)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (P,) of this rank's, ascending, and grid rows (P, D) on the device."""
        for positions in self._positions():
            for some in torch.split(positions, self.share.block_rows):
                if len(some):
                    yield some, self.share.read(some)

    def __len__(self) -> int:
        return sum(map(len, self._positions()))

    def _positions(self) -> Iterator[Tensor]:
        for positions in self.share.good_positions():
            places = positions + self.share.first
            yield positions[self.cut.takes(self.groups[positions], self.hashes[positions], places)]


def sampled_share(share: Share, num: int, *key: int) -> Share:
    """A share of `num` drawn rows, each with the rank that holds it; all of them when there are no more.

    The rows are copied, so that passes over them read nothing else: 4 m D bytes outside of the process's own memory.
    """
    if num >= share.num_good:
        return share
    draw = Draw.of(share, num, *key)
    rows = scratch((len(draw), share.dim), torch.float32)
    first = 0
    for positions, x in draw.blocks():
        rows[first : first + len(positions)] = x.cpu()
        first += len(positions)
    drawn = Rows([rows.numpy()], [np.ones(len(rows), dtype=bool)], ["the sample"])
    return join_rows(
        share.comm, drawn, block_rows=share.block_rows, device=share.device, stop_requested=share.stop_requested
    )
