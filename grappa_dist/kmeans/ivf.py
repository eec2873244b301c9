"""Assignment through lists of centroids, how often it agrees with the exact one, and Lloyd's iterations with it.

The lists are a function of the centroids alone: a k-means of the centroids, which every rank makes for itself. So
labels are the same bits on any number of ranks, and a resumed run makes the same lists again.

Shapes: P rows of one block, K centroids, D dimensions, L = sqrt(K) lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.lloyd import Progress, Updates, lloyd
from grappa_dist.distributed.rows import Rows
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, Share
from grappa_dist.kmeans.assignments import LabelPasses, RowLabels, Settled, exactly
from grappa_dist.kmeans.lloyd import KMeans, kmeans
from grappa_dist.kmeans.sampling import Draw
from grappa_dist.kmeans.update import finish
from grappa_dist.ops.probing import Lists, Propose, assign_probed
from grappa_dist.search.backends import nearest
from grappa_dist.search.candidates import Centroids, FloatProposer
from grappa_dist.search.fixed_point import exact_square

LIST_UPDATES = 5  # of the k-means that makes the lists
AGREEMENT_ROWS = 4096  # compared with the exact assignment; 0.98 of them is known to 0.2 points
_AGREEMENT = 3  # names the hashes

Work = Callable[[tuple[Tensor, Tensor]], Settled]


def lists_of(centroids: Tensor) -> Lists:
    """The centroids (K, D) in about sqrt(K) lists of near ones."""
    values, num = centroids.cpu().numpy(), isqrt(len(centroids))
    rows = Rows([values], [np.ones(len(values), dtype=bool)])
    # Not by join_rows: a repaired centroid may be a little longer than a row may.
    alone = Share(
        comm=Comm(),
        rows=rows,
        dim=values.shape[1],
        first=0,
        num_good=len(values),
        block_rows=BLOCK_ROWS,
        device=centroids.device,
        plain=(True,),
        threads=torch.get_num_threads(),
        squares=exact_square(centroids).cpu(),
        proposer=FloatProposer(nearest),
    )
    heads = values[np.arange(num) * len(values) // num]  # those of two levels lie in order: one of each family
    found = kmeans(alone, num, KMeans(iterations=LIST_UPDATES, resume=Progress(heads, ())))
    owners = torch.from_numpy(found.labels[0]).long().to(centroids.device)
    return Lists.of(Centroids.of(centroids), torch.from_numpy(found.centroids).to(centroids.device), owners)


def through_lists(centroids: Tensor, probes: int) -> Work:
    """The search for the nearest centroid of each row of a share's block in its `probes` nearest lists."""
    lists = lists_of(centroids)
    propose = None if centroids.is_cuda else inverted_file(lists, probes)

    def work(block: tuple[Tensor, Tensor]) -> Settled:
        positions, x = block
        probed = assign_probed(x, lists, probes, propose)
        return Settled(positions, x, probed.found, probed.searched)

    return work


def inverted_file(lists: Lists, probes: int) -> Propose:
    """A search of a row's lists in floats, by faiss's inverted file over the centroids."""
    import faiss

    heads, values = lists.heads.values.numpy(), np.ascontiguousarray(lists.whole.values.numpy())
    coarse = faiss.IndexFlatL2(heads.shape[1])
    coarse.add(heads)
    owners = np.empty(len(values), dtype=np.int64)
    for i, members in enumerate(lists.members):
        owners[members.numpy()] = i
    index: Any = faiss.IndexIVFFlat(coarse, heads.shape[1], len(heads))
    index.is_trained, index.nprobe = True, min(probes, len(heads))
    ids = np.arange(len(values))  # named, as all of these: a pointer keeps nothing alive
    index.add_core(len(values), faiss.swig_ptr(values), faiss.swig_ptr(ids), faiss.swig_ptr(owners))

    def propose(x: Tensor, probed: Tensor, t: int) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        unused = np.zeros(probed.shape, np.float32)  # distances to the heads, which an index without residuals ignores
        distances, found = index.search_preassigned(x.numpy(), t, probed.numpy(), unused)
        return torch.from_numpy(distances), torch.from_numpy(found)

    return propose


def refine(share: Share, probes: int, start: Progress, how: Updates) -> tuple[Progress, LabelPasses]:
    """Lloyd's iterations with assignment through lists, and the passes with the labels of the last centroids."""
    passes = LabelPasses.over(share, len(start.centroids))

    def advance(centroids: Tensor) -> Centroids:
        passes.advance(through_lists(centroids, probes), share.blocks())
        return Centroids.of(centroids)

    def finish_all(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        return finish(centroids, passes.stats, spreads, step, spherical=how.spherical)

    return lloyd(passes, advance, finish_all, start, how), passes


@dataclass(frozen=True)
class Agreement:
    """How labels compare with those of the exact assignment, on rows drawn for it."""

    rows: int
    same: int

    @property
    def share(self) -> float:
        return self.same / self.rows


def agreement(share: Share, rows: RowLabels, centroids: Tensor, seed: int) -> Agreement:
    """Measured on up to `AGREEMENT_ROWS` rows of all ranks, by comparing them with every centroid."""
    draw = Draw.of(share, AGREEMENT_ROWS, seed, len(centroids), _AGREEMENT)
    told = torch.zeros(2, dtype=torch.int64)
    for settled in share.each(exactly(share, centroids), draw.blocks()):
        same = rows.labels[settled.positions] == settled.found.labels.cpu()
        told += torch.stack([torch.tensor(len(same)), same.sum()])
    return Agreement(*share.total(told).tolist())
