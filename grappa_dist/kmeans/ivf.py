"""Assignment by inverted lists of centroids (IVF), Lloyd's iterations with it, and its agreement with the exact one.

Centroids are kept in L lists of near centroids, each with a coarse centroid: a k-means of the centroids, which every
rank computes itself. A row is compared with the centroids in the lists of its `probes` nearest coarse centroids and
gets the nearest of them. Both steps are exact, ties go to the lowest index, so a label is a function of the row, the
lists and the number of probes: the same bits on any number of ranks, and in a resumed run.

Shapes: P rows of one block, K centroids, L = sqrt(K) lists, D dimensions, p probes, t candidates per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.config import ClusteringConfig
from grappa_dist.data.rng import RowDraw
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, Rows, ShardedRows
from grappa_dist.kmeans.assignments import AssignedRows, LabelPasses, RowLabels, Search, exact_search, searched
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, kmeans, lloyd
from grappa_dist.kmeans.sampling import Draw
from grappa_dist.kmeans.update import update_centroids
from grappa_dist.search.backends import nearest
from grappa_dist.search.candidates import Centroids, Float32Generator, float_error, nearest_float32, norm_of
from grappa_dist.search.candidates import Search as FloatSearch
from grappa_dist.search.dense import DenseCentroids, DenseRows, nearest_dense
from grappa_dist.search.fixed_point import exact_dot, exact_square
from grappa_dist.search.in_flight import Work
from grappa_dist.search.rerank import FAR, Assignment, assign, nearest_of_pairs

LIST_UPDATES = 5  # of the k-means that makes the lists
NUM_CANDIDATES = 4  # centroids per row that a float search lists
AGREEMENT_ROWS = 4096  # compared with the exact assignment; 0.98 of them is known to 0.2 points
_COLUMN_BITS = 12  # squared distances lie below 2**51, so distance * 2**12 + column fits into an int64
_TILE = 2**21  # elements of the largest table made at once

BlockSearch = Search[tuple[Tensor, Tensor]]
"""Positions (P,) and grid rows (P, D) of a block -> the nearest centroids that a search found for them."""

ProbedSearch = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(rows, their lists (P, p), t) -> float32 squared distances (P, t), best first, and centroids (P, t), -1 for none."""


def refine(sharded: ShardedRows, start: KMeansState, task: KMeansTask) -> tuple[KMeansState, LabelPasses]:
    """Lloyd's iterations with assignment through lists, and the passes with the labels of the last centroids."""
    passes = LabelPasses.over(sharded, len(start.centroids))

    def advance(centroids: Tensor) -> Centroids:
        passes.advance(probed_search(centroids, task.config.probes), sharded.blocks())
        return Centroids.of(centroids)

    def update(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        return update_centroids(centroids, passes.stats, spreads, step, spherical=task.config.spherical)

    return lloyd(passes, advance, update, start, task), passes


@dataclass(frozen=True)
class Agreement:
    """How many labels are those of the exact assignment, among rows drawn for the comparison."""

    rows: int
    same: int

    @property
    def share(self) -> float:
        return self.same / self.rows


def agreement(sharded: ShardedRows, rows: RowLabels, centroids: Tensor, seed: int) -> Agreement:
    """Measured on up to `AGREEMENT_ROWS` rows of all ranks, by comparing them with every centroid."""
    draw = Draw.of(sharded, AGREEMENT_ROWS, *RowDraw.AGREEMENT.key(seed, len(centroids)))
    counts = torch.zeros(2, dtype=torch.int64)
    for assigned in searched(sharded, exact_search(sharded, centroids), draw.blocks()):
        same = rows.labels[assigned.positions] == assigned.found.labels.cpu()
        counts += torch.stack([torch.tensor(len(same)), same.sum()])
    return Agreement(*sharded.total(counts).tolist())


def probed_search(centroids: Tensor, probes: int) -> BlockSearch:
    """The search for the nearest centroid of each row of a block among its `probes` nearest lists."""
    lists = build_lists(centroids)
    if centroids.is_cuda:
        return _probed_search_on_device(lists, probes)
    list_search = faiss_search(lists, probes)

    def search(block: tuple[Tensor, Tensor]) -> AssignedRows:
        positions, x = block
        probed = assign_probed(x, lists, probes, list_search)
        return AssignedRows(positions, x, probed.found, probed.searched)

    return search


def _probed_search_on_device(lists: CentroidLists, probes: int) -> BlockSearch:
    whole = DenseCentroids.of(lists.whole)
    parts = [whole.pick(members) for members in lists.members]

    def search(block: tuple[Tensor, Tensor]) -> Work[AssignedRows]:
        positions, x = block
        probed, _ = nearest_exactly(x, lists.coarse, min(probes, len(parts)))  # (P, p)
        squares, best = exact_square(x), Assignment(*_none_for(x))
        wanted, order = probed.flatten().sort(stable=True)
        sizes = yield torch.zeros(len(parts), dtype=torch.int64, device=x.device).index_add_(
            0, wanted, torch.ones_like(wanted)
        )
        undecided = 0
        for part, members, places in zip(parts, lists.members, order.split(sizes), strict=True):
            if not len(places):
                continue
            rows = places // probed.shape[1]
            some = DenseRows(x.index_select(0, rows), squares[rows])
            found = yield from nearest_dense(some, part, distances=True)
            assert found.squares is not None
            _take_closer(best.labels, best.squares, rows, (members[found.labels], found.squares))
            undecided += found.by_integers
        compared = len(x) * len(parts) + sum(size * len(part) for size, part in zip(sizes, parts, strict=True))
        return AssignedRows(positions, x, replace(best, undecided=undecided), compared)

    return search


def _none_for(x: Tensor) -> tuple[Tensor, Tensor]:
    """Labels -1 and distances `FAR` (P,) each, for rows (P, D)."""
    labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    return labels, torch.full_like(labels, FAR)


def build_lists(centroids: Tensor) -> CentroidLists:
    """The centroids (K, D) in about sqrt(K) lists of near centroids."""
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
    coarse = values[np.arange(num) * len(values) // num]  # after two levels, one of each coarse cluster
    task = KMeansTask(ClusteringConfig(iterations=LIST_UPDATES), resume=KMeansState(coarse, ()))
    found = kmeans(alone, num, task)
    owners = torch.from_numpy(found.labels[0]).long().to(centroids.device)
    return CentroidLists.of(Centroids.of(centroids), torch.from_numpy(found.centroids).to(centroids.device), owners)


@dataclass(frozen=True)
class CentroidLists:
    """Centroids in lists of near centroids; no list is empty."""

    whole: Centroids
    coarse: Centroids  # L of them
    members: tuple[Tensor, ...]  # per list its centroids, ascending

    @staticmethod
    def of(centroids: Centroids, coarse: Tensor, owners: Tensor) -> CentroidLists:
        """The lists of coarse centroids (L, D), given the one (K,) of each centroid; empty lists are left out."""
        order = owners.argsort(stable=True)
        found = torch.split(order, torch.bincount(owners, minlength=len(coarse)).tolist())
        kept = [i for i, members in enumerate(found) if len(members)]
        return CentroidLists(centroids, Centroids.of(coarse[kept]), tuple(found[i] for i in kept))


@dataclass(frozen=True)
class Probed:
    """An assignment, and how many distances it took."""

    found: Assignment
    searched: int


def assign_probed(x: Tensor, lists: CentroidLists, probes: int, search: ProbedSearch | None = None) -> Probed:
    """The nearest centroid in each grid row's lists, exactly; a tie goes to the lowest index.

    Without `search`, and for rows with more near-ties than it has candidates, the lists are searched by `assign`.
    """
    probes = min(probes, len(lists.members))
    probed, _ = nearest_exactly(x, lists.coarse, probes)  # (P, p)
    sizes = torch.tensor([len(members) for members in lists.members], device=x.device)
    searched = len(x) * len(sizes) + int(sizes[probed].sum())
    if search is None or not len(x):
        return Probed(_search_lists(x, lists, probed), searched)
    distances, candidates = search(x, probed, NUM_CANDIDATES)  # (P, t)
    squares = exact_square(x)
    margin = 2 * float_error(x.shape[1], (norm_of(squares) + lists.whole.norm) ** 2)
    possible = (distances.double() <= distances[:, :1].double() + margin) & (candidates >= 0)
    rows, places = possible[:, :-1].nonzero().unbind(1)
    nearest = nearest_of_pairs(x, squares, lists.whole, (rows, candidates[rows, places]))
    unresolved = possible[:, -1].nonzero()[:, 0]  # the last candidate may be the nearest, so others may be too
    if len(unresolved):
        found = _search_lists(x[unresolved], lists, probed[unresolved])
        nearest.labels[unresolved], nearest.squares[unresolved] = found.labels, found.squares
    return Probed(replace(nearest, undecided=int(possible[:, 1].sum())), searched)


def _search_lists(x: Tensor, lists: CentroidLists, probed: Tensor) -> Assignment:
    """By one search per list, for all rows that probe it."""
    labels, squares = _none_for(x)
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
    """Gives some rows, in place, the labels and squared distances of competitors where these are nearer."""
    new, theirs = competitors
    own, nearest = squares[rows], labels[rows]
    closer = (theirs < own) | ((theirs == own) & (new < nearest))
    labels[rows], squares[rows] = torch.where(closer, new, nearest), torch.where(closer, theirs, own)


def faiss_search(lists: CentroidLists, probes: int) -> ProbedSearch:
    """The search of a row's lists in float32, by faiss's inverted file over the centroids."""
    import faiss

    coarse, values = lists.coarse.values.numpy(), np.ascontiguousarray(lists.whole.values.numpy())
    quantizer = faiss.IndexFlatL2(coarse.shape[1])
    quantizer.add(coarse)
    owners = np.empty(len(values), dtype=np.int64)
    for i, members in enumerate(lists.members):
        owners[members.numpy()] = i
    index: Any = faiss.IndexIVFFlat(quantizer, coarse.shape[1], len(coarse))
    index.is_trained, index.nprobe = True, min(probes, len(coarse))
    ids = np.arange(len(values))  # a variable, like the other arrays: a pointer keeps nothing alive
    index.add_core(len(values), faiss.swig_ptr(values), faiss.swig_ptr(ids), faiss.swig_ptr(owners))

    def search(x: Tensor, probed: Tensor, t: int) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        ignored = np.zeros(probed.shape, np.float32)  # distances to coarse centroids: only residuals would need them
        distances, found = index.search_preassigned(x.numpy(), t, probed.numpy(), ignored)
        return torch.from_numpy(distances), torch.from_numpy(found)

    return search


def nearest_set(x: Tensor, centroids: Centroids, t: int, search: FloatSearch = nearest_float32) -> Tensor:
    """The t nearest centroids of each grid row as a set, (P, t) in no order; of equal ones those of lower index.

    Floats decide where the t-th and the next one clearly differ, `nearest_exactly` elsewhere.
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
