"""k-means on two levels: coarse clusters, then all of their sub-clusters at once. The same bits on any number of ranks.

A row is compared with the C coarse centroids once, and then in each iteration only with the sub-centroids of its own
coarse cluster, so an iteration compares about n sqrt(K) pairs instead of n K. Ranks need not hold equal parts of a
coarse cluster: the sums of all clusters travel together once an iteration.

Shapes: n rows of this rank, P of one block, C coarse clusters, K centroids, D dimensions.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grappa_dist.data.rng import RowDraw
from grappa_dist.distributed.sharded_rows import PIECE, ShardedRows, scratch
from grappa_dist.kmeans.assignments import (
    AssignedRows,
    LabelPasses,
    Search,
    assign_rows,
    exact_search,
    search_dense,
    searched,
)
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, lloyd
from grappa_dist.kmeans.sampling import RACE_BITS, distributed_topk, race_keys, row_hashes
from grappa_dist.kmeans.seeding import to_weights
from grappa_dist.kmeans.update import Stats, update_centroids
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.dense import DenseCentroids
from grappa_dist.search.in_flight import Work, sent
from grappa_dist.search.rerank import assign

_NO_CENTROID = 2**51  # squared distance of a row whose cluster has no centroid yet: above any other


def fit_subclusters(sharded: ShardedRows, coarse: np.ndarray, num_labels: int, task: KMeansTask) -> KMeansState:
    """K centroids (K, D), those of a coarse cluster in a row, by Lloyd's iterations within the coarse clusters.

    Args:
        coarse: coarse centroids (C, D); rows belong to the nearest one.
    """
    search = exact_search(sharded, torch.from_numpy(coarse).to(sharded.device))
    labels = assign_rows(sharded, search, sharded.blocks())[0].labels
    clusters = CoarseClusters.of(sharded, labels, len(coarse), num_labels)
    start = task.resume
    if start is None:
        start = KMeansState(_first_centroids(clusters, num_labels, task.seed).cpu().numpy(), ())
        task.on_update(start)
    passes = LabelPasses.over(sharded, num_labels)

    def advance(centroids: Tensor) -> Centroids:
        prepared = Centroids.of(centroids, sharded.generator)
        passes.advance(_search_within(clusters, prepared), clusters.blocks())
        return prepared

    def update(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        new, repaired = centroids.clone(), 0
        for _, own in clusters.subclusters():  # an empty cluster is repaired within its coarse cluster
            stats = Stats(passes.stats.counts[own], passes.stats.sums[own], passes.stats.squares[:, own])
            new[own], splits = update_centroids(
                centroids[own], stats, spreads[own], step, spherical=task.config.spherical
            )
            repaired += splits
        return new, repaired

    return lloyd(passes, advance, update, start, task)


@dataclass(frozen=True)
class CoarseClusters:
    """This rank's rows by coarse cluster, and the labels of the sub-clusters of each."""

    sharded: ShardedRows
    coarse: Tensor  # (n,) int32, -1 for bad rows
    order: Tensor  # (number of good rows,) int64 positions, by coarse cluster, ascending in each
    starts: list[int]  # C + 1 places in `order`
    first_labels: list[int]  # C + 1: the first label of each cluster, and K

    @staticmethod
    def of(sharded: ShardedRows, coarse: Tensor, num_coarse: int, num_labels: int) -> CoarseClusters:
        own = torch.zeros(num_coarse, dtype=torch.int64)
        for labels in torch.split(coarse, PIECE):
            own += torch.bincount(labels[labels >= 0].long(), minlength=num_coarse)
        sizes = sharded.total(own.clone()).tolist()
        starts, first_labels = ([0, *np.cumsum(n).tolist()] for n in (own.tolist(), apportion(sizes, num_labels)))
        order, free = scratch((starts[-1],), torch.int64), torch.tensor(starts)
        for first in range(0, len(coarse), PIECE):  # a counting sort: no table of all rows in memory
            labels, places = coarse[first : first + PIECE].sort(stable=True)
            good = labels >= 0
            labels, places = labels[good].long(), places[good] + first
            counts = torch.bincount(labels, minlength=num_coarse + 1)
            before = counts.cumsum(0) - counts
            order[free[labels] + torch.arange(len(labels)) - before[labels]] = places
            free += counts
        return CoarseClusters(sharded, coarse, order, starts, first_labels)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """A coarse cluster and positions (P,) of some of its rows."""
        for i, (first, after) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            for start in range(first, after, self.sharded.block_rows):
                yield i, self.order[start : min(after, start + self.sharded.block_rows)]

    def subclusters(self) -> Iterator[tuple[int, slice]]:
        """Each coarse cluster that has sub-clusters, and their labels."""
        for i, (first, after) in enumerate(zip(self.first_labels, self.first_labels[1:], strict=False)):
            if after > first:
                yield i, slice(first, after)


def apportion(sizes: Sequence[int], num_labels: int) -> list[int]:
    """Labels per coarse cluster, (C,), in proportion to its rows by largest remainders; their sum is `num_labels`.

    A cluster with rows gets at least one label and at most as many as it has rows; one without rows gets none. Of equal
    remainders that of the lowest cluster comes first.

    Raises:
        ValueError: there are more labels than rows, or fewer than clusters with rows.
    """
    total, occupied = sum(sizes), sum(n > 0 for n in sizes)
    if not occupied <= num_labels <= total:
        raise ValueError(f"num_labels must be from {occupied} (clusters with rows) to {total} (rows), got {num_labels}")
    labels = [max(1, num_labels * n // total) if n else 0 for n in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(num_labels * sizes[i] % total), i))
    missing = num_labels - sum(labels)
    while missing > 0:
        for i in by_remainder:
            if missing and labels[i] < sizes[i]:
                labels[i] += 1
                missing -= 1
    largest = [(-n, i) for i, n in enumerate(labels) if n > 1]
    heapq.heapify(largest)
    for _ in range(-missing):  # the single labels of small clusters were too many
        n, i = heapq.heappop(largest)
        labels[i] -= 1
        if labels[i] > 1:
            heapq.heappush(largest, (n + 1, i))
    return labels


def _search_within(clusters: CoarseClusters, centroids: Centroids) -> Search[tuple[int, Tensor]]:
    """The search for a row's nearest centroid among those of its coarse cluster."""
    labels = torch.arange(len(centroids.values), device=centroids.values.device)
    if clusters.sharded.dense is not None:
        return _search_within_on_device(clusters, DenseCentroids.of(centroids), labels)
    parts = {i: (own.start, centroids.pick(labels[own])) for i, own in clusters.subclusters()}

    def work(block: tuple[int, Tensor]) -> AssignedRows:
        i, positions = block
        x = clusters.sharded.read(positions)
        first, part = parts[i]
        found = assign(x, part)
        return AssignedRows(positions, x, replace(found, labels=found.labels + first), len(x) * len(part.values))

    return work


def _search_within_on_device(
    clusters: CoarseClusters, centroids: DenseCentroids, labels: Tensor
) -> Search[tuple[int, Tensor]]:
    parts = {i: (own.start, centroids.pick(labels[own])) for i, own in clusters.subclusters()}

    def work(block: tuple[int, Tensor]) -> Work[AssignedRows]:
        i, positions = block
        first, part = parts[i]
        assigned = yield from search_dense(clusters.sharded, positions, clusters.sharded.read(positions), part)
        return replace(assigned, found=replace(assigned.found, labels=assigned.found.labels + first))

    return work


def _first_centroids(clusters: CoarseClusters, num_labels: int, seed: int) -> Tensor:
    """First centroids (K, D), rows of their coarse clusters, drawn in rounds by their squared distances.

    A round doubles the centroids of each coarse cluster: it draws as many rows as there are centroids so far, in
    proportion to the distances from before the round, so all rounds together compare a row with each centroid of its
    cluster once. A coarse cluster with no row left at a distance repeats its first centroid.
    """
    sharded = clusters.sharded
    numbers = torch.tensor(clusters.first_labels).diff()
    first = torch.tensor(clusters.first_labels[:-1])
    centroids = torch.zeros(num_labels, sharded.dim, device=sharded.device)
    num_rows = (len(sharded.rows),)
    keys, groups = scratch(num_rows, torch.int64), scratch(num_rows, torch.int32).fill_(-1)
    squares = scratch(num_rows, torch.int64).fill_(_NO_CENTROID)
    present, at_once = torch.zeros_like(numbers), (numbers > 0).long()
    for number in itertools.count():
        _race_keys(clusters, squares, (keys, groups), RowDraw.HIERARCHICAL_START.key(seed, num_labels, number))
        drawn, rows = _drawn_rows(clusters, groups, keys, at_once)
        slots = torch.cat([first[i] + present[i] + torch.arange(int(n)) for i, n in enumerate(drawn)])
        centroids[slots] = rows
        _lower_squares(clusters, squares, centroids, (first + present, drawn))
        present += drawn
        at_once = torch.minimum(numbers - present, torch.where(drawn > 0, present, 0))
        if not bool(at_once.any()):
            break
    for i in (present < numbers).nonzero()[:, 0].tolist():
        centroids[first[i] + present[i] : first[i] + numbers[i]] = centroids[first[i]]
    return centroids


def _race_keys(clusters: CoarseClusters, squares: Tensor, out: tuple[Tensor, Tensor], key: tuple[int, ...]) -> None:
    """Keys and groups, in place, of the rows that may be drawn."""
    keys, groups = out
    for positions in torch.split(clusters.order, PIECE):
        weights = to_weights(squares[positions])
        hashes = row_hashes(positions + clusters.sharded.first, *key)
        keys[positions] = race_keys(hashes, weights)
        groups[positions] = torch.where(weights > 0, clusters.coarse[positions], -1)


def _drawn_rows(clusters: CoarseClusters, groups: Tensor, keys: Tensor, at_once: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows of each cluster were drawn, (C,), and the rows of all ranks, by cluster, then by place, (M, D)."""
    sharded = clusters.sharded
    selection = distributed_topk(sharded, groups, keys, at_once, bits=RACE_BITS)
    taken = [p[selection.takes(groups[p], keys[p], p + sharded.first)] for p in torch.split(clusters.order, PIECE)]
    positions = torch.cat(taken) if taken else torch.zeros(0, dtype=torch.int64)
    owners = clusters.coarse[positions].long()
    table = torch.stack(sharded.gather(torch.bincount(owners, minlength=len(at_once))[None])).view(-1, len(at_once))
    drawn = table.sum(0)
    before = drawn.cumsum(0) - drawn + table[: sharded.comm.rank].sum(0)  # of lower clusters, and of lower ranks
    own = table[sharded.comm.rank]
    rows = torch.zeros(int(drawn.sum()), sharded.dim, device=sharded.device)
    slots = before[owners] + torch.arange(len(owners)) - (own.cumsum(0) - own)[owners]
    order = positions.argsort()
    rows[slots[order]] = sharded.read(positions[order]) + 0.0  # no -0.0: it would not survive a sum over ranks
    return drawn, sharded.total(rows)


def _lower_squares(clusters: CoarseClusters, squares: Tensor, centroids: Tensor, new: tuple[Tensor, Tensor]) -> None:
    """Lowers the rows' squared distances, in place, to those to the new centroids of their coarse cluster."""
    slots = {i: slice(a, a + n) for i, (a, n) in enumerate(zip(*(t.tolist() for t in new), strict=True)) if n}
    if clusters.sharded.dense is not None:
        _lower_squares_on_device(clusters, squares, centroids, slots)
        return
    parts = {i: Centroids.of(centroids[some], clusters.sharded.generator) for i, some in slots.items()}

    def work(block: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        i, positions = block
        return positions, assign(clusters.sharded.read(positions), parts[i]).squares.cpu()

    blocks = (block for block in clusters.blocks() if block[0] in parts)
    for positions, found in clusters.sharded.each(work, blocks):
        squares[positions] = torch.minimum(squares[positions], found)


def _lower_squares_on_device(
    clusters: CoarseClusters, squares: Tensor, centroids: Tensor, slots: Mapping[int, slice]
) -> None:
    sharded = clusters.sharded
    whole = DenseCentroids.of(Centroids.of(centroids, sharded.generator))
    places = torch.arange(len(centroids), device=centroids.device)
    parts = {i: whole.pick(places[some]) for i, some in slots.items()}
    nearest = torch.full((len(squares),), _NO_CENTROID, dtype=torch.int64, device=sharded.device)

    def work(block: tuple[int, Tensor]) -> Work[AssignedRows]:
        i, positions = block
        return search_dense(sharded, positions, sharded.read(positions), parts[i])

    for assigned in searched(sharded, work, (block for block in clusters.blocks() if block[0] in parts)):
        nearest[sent(assigned.positions, sharded.device)] = assigned.found.squares
    for some, found in zip(squares.split(PIECE), nearest.split(PIECE), strict=True):
        torch.minimum(some, found.cpu(), out=some)
