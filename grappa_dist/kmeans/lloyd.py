"""k-means by Lloyd's iterations over the rows of all ranks: the same bits on any number of ranks, split and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (search/rerank.py, kmeans/yinyang.py) and every number that travels is an integer (kmeans/update.py).

An iteration is a pass over the rows, which assigns them to their nearest centroids, and an update of the centroids.
`lloyd` runs iterations with any pass: exact ones with bounds (`BoundedPasses`), which can serve several K at once, and
those of the methods that shorten the assignment (kmeans/hierarchical.py, kmeans/ivf.py).

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import (
    GridRows,
    RowBlock,
    Rows,
    ShardedRows,
    join_rows,
    on_grid,
    row_problem,
    scratch,
)
from grappa_dist.kmeans.centroid_slices import CentroidSlice
from grappa_dist.kmeans.dense_passes import DensePasses, dense_pass
from grappa_dist.kmeans.seeding import Init, SeedingState, oversampled_places, rows_at, seed_places
from grappa_dist.kmeans.sliced_passes import SlicedPasses, slice_of
from grappa_dist.kmeans.update import Stats, update_centroids
from grappa_dist.kmeans.yinyang import Bounds, Drift, GroupedCentroids, Groups, Reassignments, num_bounds, reassign
from grappa_dist.search.candidates import Centroids, joined
from grappa_dist.search.fixed_point import GRID, to_grid

SQUARE_UNIT = 1 / GRID**2  # of exact squared distances
ROWS_AT_ONCE = 4096  # first centroids that all ranks read, of which each keeps those of its slice


@dataclass(frozen=True)
class KMeansState:
    """The state of k-means after an update, or during the initialisation: a resumed run ends with the same result."""

    # (K, D) float32, after the update; (0, D) during the initialisation and, where they are sharded, on all ranks but
    # the first, which has them in a mapped file
    centroids: np.ndarray
    inertia: tuple[int, ...]  # exact, before each update, in units of 2**-48
    repaired: int = 0  # empty clusters so far
    seeded: SeedingState | None = None  # the state of the initialisation, during it

    def problem(self) -> str:
        """What is wrong with the centroids, "" when nothing is: exact arithmetic needs values on the grid."""
        if self.centroids.ndim != 2 or self.centroids.dtype != np.float32:
            return f"centroids must be (K, D) float32, found {self.centroids.shape} {self.centroids.dtype}"
        if on_grid(self.centroids):
            return ""
        wrong = next(i for i, row in enumerate(self.centroids) if not on_grid(row[None]))
        finite = np.isfinite(self.centroids[wrong]).all()
        return f"centroid {wrong} " + ("is off the grid of exact arithmetic" if finite else "is not finite")


@dataclass(frozen=True)
class ProgressCallbacks:
    """Functions that k-means calls on every rank; their first argument is the part of the method, for display."""

    on_iteration: Callable[[str, int, float], None] = lambda part, iteration, inertia: None  # updates so far, inertia
    on_seeding: Callable[[str, int, int], None] = lambda part, found, wanted: None  # first centroids, after each round


@dataclass(frozen=True)
class KMeansTask:
    """One k-means, the same on all ranks: settings, and where it starts.

    Of the settings it uses `iterations`, `tolerance` and `spherical`; the others belong to the whole method
    (kmeans/methods.py), which also settles an `init` that is "auto".
    """

    config: ClusteringConfig = field(default_factory=ClusteringConfig)
    _: KW_ONLY
    seed: int = 0
    init: Init = "k-means++"  # how first centroids are found
    initial: np.ndarray | None = None  # first centroids (K, D), instead of finding them
    resume: KMeansState | None = None  # the last argument of `on_update`, to continue from
    part: str = ""  # the first argument of `callbacks`
    callbacks: ProgressCallbacks = ProgressCallbacks()
    on_update: Callable[[KMeansState], None] = lambda state: None  # after each round of seeding and each update


@dataclass(frozen=True)
class KMeansResult:
    """The same on every rank, except for `labels`, which are those of the rank's own rows, and sharded centroids."""

    centroids: np.ndarray  # (K, D) float32; where they are sharded as in a `KMeansState`
    labels: list[np.ndarray]  # for each own shard (P,) int32, -1 for bad rows; nearest to `centroids`
    counts: np.ndarray  # (K,) int64, rows per label
    inertia: list[float]  # sum of squared distances before each update, then that of the returned labels
    empty_repaired: int  # empty clusters that were given a part of another one, over all iterations
    empty_left: int  # labels without a row
    exact_share: float  # of all assignments, those decided in integers; depends on ranks, blocks and machine
    searched_share: float  # of all distances to all centroids, those that bounds did not save; likewise


def sharded_kmeans(
    comm: Comm,
    rows: Rows,
    num_labels: int,
    task: KMeansTask | None = None,
    *,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
    dense_bytes: int | None = None,
) -> KMeansResult:
    """k-means of the good rows of all ranks, as `kmeans`. All ranks call it with the same task.

    Args:
        block_rows, device, dense_bytes: of `join_rows`.
    """
    sharded = join_rows(comm, rows, block_rows=block_rows, device=torch.device(device), dense_bytes=dense_bytes)
    return kmeans(sharded, num_labels, task)


def kmeans(sharded: ShardedRows, num_labels: int, task: KMeansTask | None = None) -> KMeansResult:
    """k-means of the good rows of all ranks; raises as `start_fit`."""
    return run_fit(start_fit(sharded, num_labels, task or KMeansTask()))


def start_fit(sharded: ShardedRows, num_labels: int, task: KMeansTask) -> Fit:
    """Finds first centroids; the fit is before its first pass. All ranks call it with the same task.

    Raises:
        ValueError: there are fewer good rows than labels, or `task.initial` or `task.resume` do not fit.
        Stopped: on all ranks, when a stop was requested on any of them.
    """
    held = CentroidSlice(num_labels)
    start = _start(sharded, held, task)
    passes: DensePasses | BoundedPasses
    if sharded.dense is not None:
        passes = DensePasses.over(sharded, num_labels)
    else:
        passes = BoundedPasses.over(sharded, torch.from_numpy(start.centroids).to(sharded.device))
    return _fit(passes, held, start, task)


def start_sliced_fit(rows: GridRows, num_labels: int, task: KMeansTask) -> Fit:
    """As `start_fit` with sharded centroids, on CPUs: the result has the same bits."""
    held = slice_of(rows, num_labels)
    start = _start(rows.own, held, task)
    return _fit(SlicedPasses.over(rows, held, torch.from_numpy(start.centroids)), held, start, task)


def _fit(passes: AnyPasses, held: CentroidSlice, start: KMeansState, task: KMeansTask) -> Fit:
    def update(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        return update_centroids(centroids, passes.stats, spreads, step, spherical=task.config.spherical, held=held)

    steps = lloyd_steps(passes, update, start, task, held=held)
    return Fit(passes, steps, next(steps))


def _start(sharded: ShardedRows, held: CentroidSlice, task: KMeansTask) -> KMeansState:
    """The state before the next pass, with the centroids of the rank's slice."""
    sharded.check_labels(held.num)
    shape, start, own = (held.num, sharded.dim), task.resume, slice(held.own.start, held.own.stop)
    if start is not None:
        _check_resume(start, shape, task.config.iterations)
    if start is not None and not start.seeded:
        return start if held.is_whole else replace(start, centroids=start.centroids[own].copy())
    if task.initial is not None:
        first = _checked_initial(task.initial, shape, own)
    else:
        first = _first_centroids(sharded, held, task)
    task.on_update(KMeansState(held.whole(first), ()))
    return KMeansState(first.cpu().numpy(), ())


def _check_resume(resume: KMeansState, shape: tuple[int, int], iterations: int) -> None:
    if problem := resume.problem():
        raise ValueError(f"resume: {problem}")
    if (resume.centroids.shape != shape and not resume.seeded) or len(resume.inertia) > iterations:
        raise ValueError(
            f"resume has {resume.centroids.shape} centroids after {len(resume.inertia)} updates, "
            f"expected {shape} after at most {iterations}"
        )


def _first_centroids(sharded: ShardedRows, held: CentroidSlice, task: KMeansTask) -> Tensor:
    """Those of the rank's slice, (K_j, D)."""

    def on_round(seeded: SeedingState, wanted: int) -> None:
        task.callbacks.on_seeding(task.part, len(seeded.places), wanted)
        task.on_update(KMeansState(np.zeros((0, sharded.dim), np.float32), (), seeded=seeded))

    seeded = task.resume.seeded if task.resume else None
    first_places = seed_places if task.init == "k-means++" else oversampled_places
    at_once = None if held.is_whole else -(-held.num // held.ranks.size)
    places = first_places(sharded, held.num, task.seed, resume=seeded, on_round=on_round, at_once=at_once)
    if held.is_whole:
        return rows_at(sharded, places)
    first = torch.empty(len(held.own), sharded.dim)
    for start in range(0, held.num, ROWS_AT_ONCE):
        labels = range(start, min(start + ROWS_AT_ONCE, held.num))
        rows, own = rows_at(sharded, places[labels.start : labels.stop]), held.overlap(labels)
        first[own.start - held.own.start : own.stop - held.own.start] = rows[own.start - start : own.stop - start]
    return first


def _checked_initial(initial: np.ndarray, shape: tuple[int, int], own: slice) -> Tensor:
    if initial.shape != shape:
        raise ValueError(f"initial centroids must be {shape}, found {initial.shape}")
    if found := row_problem(initial, np.ones(len(initial), dtype=bool)):
        raise ValueError(f"initial centroids: row {found[0]} {found[1]}")
    return to_grid(torch.from_numpy(initial[own].astype(np.float32)))


def run_fit(fit: Fit) -> KMeansResult:
    """Runs one fit to its end."""
    return next(run_fits([fit])).result()


def run_fits(fits: list[Fit]) -> Iterator[Fit]:
    """Runs several fits of the same rows to their ends, and yields each when it ends: a pass over the rows serves all.

    Empties the list, so that fits that have ended need not stay in memory until the last one ends.
    """
    while fits:
        prepared = shared_pass([(fit.passes, fit.centroids) for fit in fits])
        for fit, centroids in zip(fits, prepared, strict=True):
            fit.after_pass(centroids)
        ended = [fit for fit in fits if fit.end]
        fits[:] = [fit for fit in fits if not fit.end]
        del prepared, fit
        while ended:
            yield ended.pop(0)


@dataclass(eq=False)
class Fit:
    """A k-means between two passes over the rows: the next one assigns them to `centroids`."""

    passes: AnyPasses
    steps: Steps
    centroids: Tensor  # (K, D) of the next pass; sharded, those of the slice
    end: KMeansState | None = None  # after the last pass

    def after_pass(self, prepared: Centroids) -> None:
        """Updates the centroids, which the pass has prepared, or ends."""
        try:
            self.centroids = self.steps.send(prepared)
        except StopIteration as stop:
            self.end = stop.value

    def result(self) -> KMeansResult:
        """The result, after the end."""
        passes, end = self.passes, self.end
        assert end is not None
        counts = passes.counts().cpu().numpy()
        of_all_ranks = passes.sharded.total(torch.tensor([passes.by_integers, passes.searched]))
        by_integers, searched = of_all_ranks.tolist()
        decisions = passes.sharded.num_good * passes.number
        return KMeansResult(
            centroids=end.centroids,
            labels=passes.labels(),
            counts=counts,
            inertia=[i * SQUARE_UNIT for i in end.inertia],
            empty_repaired=end.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=by_integers / decisions,
            searched_share=searched / (decisions * len(counts)),
        )


class Passes(Protocol):
    """The state of a clustering between its passes over the rows."""

    @property
    def sharded(self) -> ShardedRows: ...

    @property
    def stats(self) -> Stats:
        """Of all ranks, by the labels of the last pass."""


Update = Callable[[Tensor, list[int], int], tuple[Tensor, int]]
"""(centroids (K, D), spreads, step) -> new centroids and how many empty clusters were repaired."""

Steps = Generator[Tensor, Centroids, KMeansState]
"""Yields the centroids of each pass, is sent them prepared after the pass, and returns the last state."""


def lloyd(
    passes: Passes, advance: Callable[[Tensor], Centroids], update: Update, start: KMeansState, task: KMeansTask
) -> KMeansState:
    """The last centroids, with their inertia as the last entry; `passes` then holds the labels that belong to them.

    Args:
        advance: a pass: assigns the rows to some centroids, in `passes`, and returns these prepared.
        start: the first centroids, or a state to continue from.
    """
    iterations = lloyd_steps(passes, update, start, task)
    try:
        centroids = next(iterations)
        while True:
            centroids = iterations.send(advance(centroids))
    except StopIteration as end:
        last: KMeansState = end.value
        return last


def lloyd_steps(
    passes: Passes, update: Update, start: KMeansState, task: KMeansTask, *, held: CentroidSlice | None = None
) -> Steps:
    """The same as a generator, for a caller that makes the passes.

    Args:
        held: the slice whose centroids `start` has, and passes and update work on; None: all.
    """
    config, centroids = task.config, torch.from_numpy(start.centroids).to(passes.sharded.device)
    inertia, repaired, held = list(start.inertia), start.repaired, held or CentroidSlice(len(centroids))
    for step in range(len(inertia), config.iterations + 1):
        prepared = yield centroids
        spreads = passes.stats.spreads(prepared)
        inertia.append(held.total(sum(spreads)))
        task.callbacks.on_iteration(task.part, step, inertia[-1] * SQUARE_UNIT)
        if step == config.iterations or (step and _converged(inertia[-2], inertia[-1], config.tolerance)):
            break
        updated, splits = update(centroids, spreads, step)
        if held.all(not splits and torch.equal(updated, centroids)):
            break  # further steps would change nothing
        centroids, repaired = updated, repaired + splits
        task.on_update(KMeansState(held.whole(centroids), tuple(inertia), repaired))
    return KMeansState(held.whole(centroids), tuple(inertia), repaired)


def _converged(before: int, now: int, tolerance: float) -> bool:
    """Whether inertia fell by too little; it may even rise where means are normalised."""
    return tolerance > 0 and before - now < tolerance * before


def shared_pass(wanted: Sequence[tuple[AnyPasses, Tensor]]) -> list[Centroids]:
    """One pass over the rows that assigns them to the centroids of several clusterings; returns these prepared.

    A clustering with sharded centroids has a pass of its own.
    """
    if sliced := [kept.advance(centroids) for kept, centroids in wanted if isinstance(kept, SlicedPasses)]:
        assert len(sliced) == len(wanted)
        return sliced
    sharded = wanted[0][0].sharded
    assert all(kept.sharded is sharded for kept, _ in wanted)
    if dense := [(kept, centroids) for kept, centroids in wanted if isinstance(kept, DensePasses)]:
        assert len(dense) == len(wanted)
        return dense_pass(dense)
    passes = [_Pass.of(kept, centroids) for kept, centroids in wanted if isinstance(kept, BoundedPasses)]

    def work(block: RowBlock) -> list[Reassignments]:
        return [one.over(block) for one in passes]

    for found in sharded.each(work, sharded.row_blocks()):
        for one, reassigned in zip(passes, found, strict=True):
            one.kept.by_integers += reassigned.by_integers
            one.kept.searched += reassigned.searched
    for one in passes:
        one.end()
    return [one.grouped.whole for one in passes]


@dataclass
class BoundedPasses:
    """An exact k-means between its passes: labels, bounds of distances that save most of the search, and the sums of
    the rows of each label, which change only by rows that change their label."""

    sharded: ShardedRows
    groups: Groups
    bounds: Bounds  # of the good rows, in their order
    stats: Stats  # of all ranks
    centroids: Tensor  # of the last pass
    number: int = 0  # of passes so far
    by_integers: int = 0  # rows of this rank decided in integers, over all passes
    searched: int = 0  # distances estimated for rows of this rank, over all passes

    @staticmethod
    def over(sharded: ShardedRows, centroids: Tensor) -> BoundedPasses:
        num_labels, dim = centroids.shape
        groups = Groups.around(centroids, num_bounds(num_labels, dim))
        num = sharded.rows.num_good
        bounds = Bounds(
            labels=scratch((num,), torch.int32).fill_(-1),
            upper=scratch((num,), torch.float32).fill_(math.inf),
            lower=scratch((num, len(groups.members)), torch.float32).fill_(-math.inf),
            squares=sharded.squares,
        )
        return BoundedPasses(sharded, groups, bounds, Stats.zeros(num_labels, dim, sharded.device), centroids)

    def counts(self) -> Tensor:
        """Rows of all ranks per label, (K,) int64."""
        return self.stats.counts

    def labels(self) -> list[np.ndarray]:
        """Labels of the rank's rows by shard, (P,) int32, -1 for bad rows."""
        return self.sharded.rows.labels_by_shard(self.bounds.labels.numpy())


AnyPasses = DensePasses | BoundedPasses | SlicedPasses


@dataclass(frozen=True)
class _Pass:
    """One pass of one clustering: labels, bounds and sums by new centroids."""

    kept: BoundedPasses
    grouped: GroupedCentroids
    drift: Drift | None  # of the centroids since the last pass, if there was one
    change: Stats  # of this rank's sums
    adding: Lock = field(default_factory=Lock)

    @staticmethod
    def of(kept: BoundedPasses, centroids: Tensor) -> _Pass:
        grouped = GroupedCentroids.of(centroids, kept.groups, kept.sharded.generator)
        drift = Drift.between(kept.centroids, centroids, kept.groups) if kept.number else None
        num_labels, dim = centroids.shape
        return _Pass(kept, grouped, drift, Stats.zeros(num_labels, dim, kept.sharded.device))

    def over(self, block: RowBlock) -> Reassignments:
        part = self.kept.bounds.part(block.places)
        bounds = part.to(self.kept.sharded.device)
        if self.drift:
            bounds.shift_(self.drift)
        reassigned = reassign(block.take, self.grouped, bounds)
        part.copy_(bounds)
        if len(reassigned.rows):
            x, squares = joined(block.take(reassigned.rows)), bounds.squares[reassigned.rows]
            with self.adding:
                self.change.add_(x, squares, reassigned.after, reassigned.before if self.drift else None)
        return reassigned

    def end(self) -> None:
        self.kept.centroids, self.kept.number = self.grouped.whole.values, self.kept.number + 1
        self.kept.stats.add_changes_(self.change, self.kept.sharded.total)
