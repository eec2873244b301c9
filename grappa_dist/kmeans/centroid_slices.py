"""The centroids of a k-means as slices, each held by another rank, and what these ranks find out together.

Slices are of consecutive labels and about equal; with fewer centroids than ranks some are empty. Everything that
travels is an integer or a copy of bits, so a number of slices changes no bit of a result. A vector of one number per
centroid may be whole on every rank; a matrix never is: rank 0 writes it through a mapped file.

Shapes: K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import scratch

_LIMB, _LIMBS = 31, 4  # bits of a piece of an integer, and pieces: 2**31 slices may be summed
_SENT_BYTES = 2**23  # of a slice at once
_ALONE = Comm()


@dataclass(frozen=True)
class CentroidSlice:
    """The labels whose centroids this rank holds; by default all."""

    num: int  # K
    ranks: Comm = _ALONE  # with one slice each, in the order of labels
    is_writer: bool = True  # whether it takes part where rank 0 is given all centroids

    @property
    def own(self) -> range:
        return self.of(self.ranks.rank)

    def of(self, rank: int) -> range:
        """The labels of one of the ranks."""
        return range(self.num * rank // self.ranks.size, self.num * (rank + 1) // self.ranks.size)

    def overlap(self, labels: range) -> range:
        """Which of some consecutive labels are of the own slice."""
        start = min(max(labels.start, self.own.start), self.own.stop)
        return range(start, max(start, min(labels.stop, self.own.stop)))

    @property
    def is_whole(self) -> bool:
        return self.ranks.size == 1

    def total(self, value: int) -> int:
        """The exact sum of an integer of every slice, from 0 up to 2**124."""
        limbs = [value >> _LIMB * place & 2**_LIMB - 1 for place in range(_LIMBS)]
        summed: list[int] = self.ranks.sum_(torch.tensor(limbs)).tolist()
        return sum(limb << _LIMB * place for place, limb in enumerate(summed))

    def all(self, holds: bool) -> bool:
        """Whether it holds of every slice."""
        return bool(self.ranks.min_(torch.tensor([int(holds)])))

    def gathered(self, found: Sequence[tuple[int, ...]], width: int) -> list[tuple[int, ...]]:
        """The tuples of `width` integers of all slices, in order."""
        parts = self.ranks.gather(torch.tensor(found, dtype=torch.int64).reshape(-1, width))
        return [tuple(row) for row in torch.cat(parts).tolist()]

    def joined(self, values: Tensor) -> Tensor:
        """One number for each centroid, (K,), from those of the own slice."""
        return torch.cat(self.ranks.gather(values, [len(self.of(rank)) for rank in range(self.ranks.size)]))

    def whole(self, own: Tensor) -> np.ndarray:
        """All centroids (K, D), on rank 0 of the job in a mapped file; (0, D) on other ranks.

        Without other slices they are the own ones, on every rank.
        """
        if self.is_whole:
            return own.cpu().numpy()
        rows = max(1, _SENT_BYTES // (4 * own.shape[1]))
        if not self.is_writer or self.ranks.rank:
            for part in own.contiguous().split(rows) if self.is_writer and len(own) else ():
                self.ranks.send(part, 0)
            return np.zeros((0, own.shape[1]), np.float32)
        found = scratch((self.num, own.shape[1]), torch.float32)
        found[: len(own)] = own
        for rank in range(1, self.ranks.size):
            labels = self.of(rank)
            for part in found[labels.start : labels.stop].split(rows) if labels else ():
                self.ranks.receive(part, rank)
        return found.numpy()
