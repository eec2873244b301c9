"""Rows of all ranks in lists of near ones, for a search that looks into a few lists only.

Heads are a k-means of the rows, fitted to a sample; a row belongs to the list of its nearest head and looks into those
of its p nearest. All of it is decided on integers, so it is a function of the rows and the same on any number of ranks.

Shapes: P rows of this rank, L lists, D dimensions, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.kmeans.assignments import exactly
from grappa_dist.kmeans.lloyd import KMeans, kmeans
from grappa_dist.kmeans.sampling import sampled_share
from grappa_dist.ops.probing import nearest_set
from grappa_dist.search.backends import nearest
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_dot

_FIT_ROWS = 64  # per list, that heads are fitted to
_FIT_UPDATES = 5
_FIT = 5  # names the draw


def num_lists_of(num_rows: int) -> int:
    """About twice the square root: then to find a row's lists costs about as much as to search eight of them."""
    return max(1, min(num_rows, 2 * isqrt(num_rows)))


@dataclass(frozen=True)
class Coarse:
    """The lists, and where the rows of this rank belong."""

    share: Share
    heads: Centroids  # (L, D)
    labels: Tensor  # (P,) int32, the list of each own row
    sizes: Tensor  # (ranks, L) int64, rows of each list on each rank

    @staticmethod
    def of(share: Share, seed: int) -> Coarse:
        """The lists of a share without bad rows, of which all ranks together have at least one."""
        num = num_lists_of(share.num_good)
        sample = sampled_share(share, num * _FIT_ROWS, seed, num, _FIT)
        fit = kmeans(sample, num, KMeans(iterations=_FIT_UPDATES, seed=seed))
        heads = Centroids.of(torch.from_numpy(fit.centroids))
        labels = torch.zeros(len(share.rows), dtype=torch.int32)
        for settled in share.each(exactly(share, heads.values), share.blocks()):
            labels[settled.positions] = settled.found.labels.int()
        counts = torch.bincount(labels, minlength=num)
        return Coarse(share, heads, labels, torch.stack(share.gather(counts[None])).reshape(-1, num))

    def __len__(self) -> int:
        return len(self.heads.values)

    def probed(self, probes: int) -> Tensor:
        """The nearest lists of each own row, (P, p) int32, in no order."""
        probed = torch.zeros((len(self.labels), min(probes, len(self))), dtype=torch.int32)

        def work(block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            positions, x = block
            return positions, nearest_set(x, self.heads, probed.shape[1], nearest).int()

        for positions, lists in self.share.each(work, self.share.blocks()):
            probed[positions] = lists
        return probed

    def lists_of(self, ids: np.ndarray, own_ids: np.ndarray) -> Tensor:
        """The list of each of some rows of any rank, by row id; that of id -1 is -1. The ids are those of all ranks."""
        places = np.searchsorted(own_ids, ids)
        here = np.zeros(ids.shape, dtype=bool)
        if len(own_ids):
            here = own_ids[np.minimum(places, len(own_ids) - 1)] == ids
        told = torch.zeros(ids.shape, dtype=torch.int64)
        told[torch.from_numpy(here)] = self.labels[torch.from_numpy(places[here])].long() + 1
        return self.share.total(told) - 1

    def rank_of(self, x: Tensor, lists: Tensor) -> Tensor:
        """Of each row (m, D) how many lists are nearer than some given ones (m, k), (m, k) int64."""
        far = self.heads.squares - 2 * exact_dot(x, self.heads.values)  # (m, L), less |x|^2
        order = far.argsort(dim=1, stable=True)  # of equal ones the lower first
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(len(self)).expand_as(order))
        return ranks.gather(1, lists.clamp(min=0))
