"""Assignment through lists of centroids, how often it agrees with the exact one, and Lloyd's iterations with it.

The lists are a function of the centroids alone: a k-means of the centroids, which every rank makes for itself. So
labels are the same bits on any number of ranks, and a resumed run makes the same lists again.

Shapes: P rows of one block, K centroids, D dimensions, L = sqrt(K) lists.

Assignment to the nearest centroid of a few lists: an inverted file over the centroids, decided on integers.

Centroids are kept in lists of near ones, each with a head. A row looks into the lists of its `probes` nearest heads and
gets the nearest centroid in them. Both steps are exact, ties going to the lowest index, so the label is a fact about
the row, the lists and the number of probes: floats propose, and blocks and threads have no say in it.

Shapes: P rows of one block, K centroids, L lists, D dimensions, p probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.data.rng import RowDraw
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, Rows, ShardedRows
from grappa_dist.kmeans.assignments import AssignedRows, LabelPasses, RowLabels, exactly
from grappa_dist.kmeans.lloyd import KMeans, KMeansState, Updates, kmeans, lloyd
from grappa_dist.kmeans.sampling import Draw
from grappa_dist.kmeans.update import finish
from grappa_dist.search.backends import nearest
from grappa_dist.search.candidates import Centroids, Float32Generator, Search, float_error, nearest_float32, norm_of
from grappa_dist.search.fixed_point import exact_dot, exact_square
from grappa_dist.search.rerank import FAR, Assignment, assign, nearest_of_pairs

PROPOSALS = 4  # centroids per row that floats propose
Propose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(rows, their lists (P, p), t) -> float32 squared distances (P, t), best first, and centroids (P, t), -1 for none."""

_COLUMN_BITS = 12  # squared distances lie below 2**51, so distance * 2**12 + column fits into an int64
_TILE = 2**21  # elements of the largest table made at once


def nearest_exactly(x: Tensor, centroids: Centroids, t: int) -> tuple[Tensor, Tensor]:
    """The t nearest centroids of each grid row, (P, t), nearest first, ties by index, and exact squared distances."""
    size = 2**_COLUMN_BITS
    rows = max(1, _TILE // min(size, len(centroids.values)))
    parts = [_nearest_of(part, centroids, t) for part in torch.split(x, rows)]
    if not parts:
        none = torch.zeros((0, t), dtype=torch.int64, device=x.device)
        return none, none
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _nearest_of(x: Tensor, centroids: Centroids, t: int) -> tuple[Tensor, Tensor]:
    own, size = exact_square(x)[:, None], 2**_COLUMN_BITS
    labels = torch.zeros((len(x), 0), dtype=torch.int64, device=x.device)
    squares = torch.zeros_like(labels)
    for start in range(0, len(centroids.values), size):
        some = slice(start, start + size)
        table = (own + centroids.squares[some] - 2 * exact_dot(x, centroids.values[some])).long()  # (P, columns)
        table.mul_(size).add_(torch.arange(table.shape[1], device=x.device))  # no two of a row are equal any more
        best = table.topk(min(t, table.shape[1]), dim=1, largest=False).values
        labels = torch.cat([labels, best % size + start], 1)
        squares = torch.cat([squares, best // size], 1)
        if start:  # stable: earlier columns have lower indices
            order = squares.argsort(dim=1, stable=True)[:, :t]
            labels, squares = labels.gather(1, order), squares.gather(1, order)
    return labels, squares


def nearest_set(x: Tensor, centroids: Centroids, t: int, search: Search = nearest_float32) -> Tensor:
    """The t nearest centroids of each grid row as a set, (P, t) in no order; of equal ones those of lower index.

    Floats settle it where the t-th and the next one lie clearly apart, `nearest_exactly` does elsewhere.
    """
    num, dim = centroids.values.shape
    if t >= num or not len(x):
        return torch.arange(num, device=x.device)[:t].expand(len(x), -1)
    distances, found = search(x, centroids.values, t + 1)
    error = float_error(dim, (norm_of(exact_square(x)) + centroids.norm) ** 2)
    chosen = found[:, :t].clone()
    close = (distances[:, t].double() - distances[:, t - 1].double() <= 2 * error).nonzero()[:, 0]
    if len(close):
        chosen[close] = nearest_exactly(x[close], centroids, t)[0]
    return chosen


@dataclass(frozen=True)
class Lists:
    """Centroids in lists of near ones; every list has some."""

    whole: Centroids
    heads: Centroids  # L of them
    members: tuple[Tensor, ...]  # per list its centroids, ascending

    @staticmethod
    def of(centroids: Centroids, heads: Tensor, owners: Tensor) -> Lists:
        """The lists of some heads (L, D), given the head (K,) of each centroid; heads of none are left out."""
        order = owners.argsort(stable=True)
        found = torch.split(order, torch.bincount(owners, minlength=len(heads)).tolist())
        kept = [i for i, members in enumerate(found) if len(members)]
        return Lists(centroids, Centroids.of(heads[kept]), tuple(found[i] for i in kept))


@dataclass(frozen=True)
class Probed:
    """An assignment, and how many distances it took."""

    found: Assignment
    searched: int


def assign_probed(x: Tensor, lists: Lists, probes: int, propose: Propose | None = None) -> Probed:
    """The nearest centroid in each grid row's lists, exactly; a tie goes to the lowest index.

    Without `propose`, and for rows with more near-ties than it proposes, the lists are searched by `assign`.
    """
    probes = min(probes, len(lists.members))
    probed, _ = nearest_exactly(x, lists.heads, probes)  # (P, p)
    sizes = torch.tensor([len(members) for members in lists.members], device=x.device)
    searched = len(x) * len(sizes) + int(sizes[probed].sum())
    if propose is None or not len(x):
        return Probed(_search_lists(x, lists, probed), searched)
    distances, proposed = propose(x, probed, PROPOSALS)  # (P, t)
    squares = exact_square(x)
    gap = 2 * float_error(x.shape[1], (norm_of(squares) + lists.whole.norm) ** 2)
    possible = (distances.double() <= distances[:, :1].double() + gap) & (proposed >= 0)
    rows, places = possible[:, :-1].nonzero().unbind(1)
    nearest = nearest_of_pairs(x, squares, lists.whole, (rows, proposed[rows, places]))
    more = possible[:, -1].nonzero()[:, 0]  # as near as the floats can tell, and there may be others
    if len(more):
        found = _search_lists(x[more], lists, probed[more])
        nearest.labels[more], nearest.squares[more] = found.labels, found.squares
    return Probed(replace(nearest, undecided=int(possible[:, 1].sum())), searched)


def _search_lists(x: Tensor, lists: Lists, probed: Tensor) -> Assignment:
    """By one search per list, for all rows that look into it."""
    labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    squares = torch.full_like(labels, FAR)
    undecided, whole = 0, lists.whole
    wanted, order = probed.flatten().sort(stable=True)
    names, sizes = wanted.unique_consecutive(return_counts=True)
    for name, places in zip(names.tolist(), torch.split(order, sizes.tolist()), strict=True):
        rows, members = places // probed.shape[1], lists.members[name]
        found = assign(x[rows], whole.pick(members))
        _take_closer(labels, squares, rows, (members[found.labels], found.squares))
        undecided += found.undecided
    return Assignment(labels, squares, undecided)


def _take_closer(labels: Tensor, squares: Tensor, rows: Tensor, competitors: tuple[Tensor, Tensor]) -> None:
    """Gives some rows, in place, their competitors' labels and squared distances where these are better."""
    new, theirs = competitors
    closer = (theirs < squares[rows]) | ((theirs == squares[rows]) & (new < labels[rows]))
    labels[rows[closer]], squares[rows[closer]] = new[closer], theirs[closer]


LIST_UPDATES = 5  # of the k-means that makes the lists
AGREEMENT_ROWS = 4096  # compared with the exact assignment; 0.98 of them is known to 0.2 points

Work = Callable[[tuple[Tensor, Tensor]], AssignedRows]


def lists_of(centroids: Tensor) -> Lists:
    """The centroids (K, D) in about sqrt(K) lists of near ones."""
    values, num = centroids.cpu().numpy(), isqrt(len(centroids))
    rows = Rows([values], [np.ones(len(values), dtype=bool)])
    # Not by join_rows: a repaired centroid may be a little longer than a row may.
    alone = ShardedRows(
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
        generator=Float32Generator(nearest),
    )
    heads = values[np.arange(num) * len(values) // num]  # those of two levels lie in order: one of each family
    found = kmeans(alone, num, KMeans(iterations=LIST_UPDATES, resume=KMeansState(heads, ())))
    owners = torch.from_numpy(found.labels[0]).long().to(centroids.device)
    return Lists.of(Centroids.of(centroids), torch.from_numpy(found.centroids).to(centroids.device), owners)


def through_lists(centroids: Tensor, probes: int) -> Work:
    """The search for the nearest centroid of each row of a share's block in its `probes` nearest lists."""
    lists = lists_of(centroids)
    propose = None if centroids.is_cuda else inverted_file(lists, probes)

    def work(block: tuple[Tensor, Tensor]) -> AssignedRows:
        positions, x = block
        probed = assign_probed(x, lists, probes, propose)
        return AssignedRows(positions, x, probed.found, probed.searched)

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


def refine(sharded: ShardedRows, probes: int, start: KMeansState, how: Updates) -> tuple[KMeansState, LabelPasses]:
    """Lloyd's iterations with assignment through lists, and the passes with the labels of the last centroids."""
    passes = LabelPasses.over(sharded, len(start.centroids))

    def advance(centroids: Tensor) -> Centroids:
        passes.advance(through_lists(centroids, probes), sharded.blocks())
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


def agreement(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, seed: int) -> Agreement:
    """Measured on up to `AGREEMENT_ROWS` rows of all ranks, by comparing them with every centroid."""
    draw = Draw.of(sharded, AGREEMENT_ROWS, *RowDraw.AGREEMENT.key(seed, len(centroids)))
    told = torch.zeros(2, dtype=torch.int64)
    for settled in sharded.each(exactly(sharded, centroids), draw.blocks()):
        same = rows.labels[settled.positions] == settled.found.labels.cpu()
        told += torch.stack([torch.tensor(len(same)), same.sum()])
    return Agreement(*sharded.total(told).tolist())
