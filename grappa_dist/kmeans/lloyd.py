"""k-means over the ranks of one job: the same result on any number of ranks, for any split of the rows and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (kmeans/update.py) and every number that travels is an integer.

Shapes: P rows of one block, K centroids, D dimensions.

Lloyd's iterations around any pass: exact ones with bounds, and those that shorten the assignment.

Shapes: K centroids, D dimensions.

Passes of exact k-means over the rows of a rank, for one number of labels or for several at once.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import (
    BLOCK_ROWS,
    RowBlock,
    Rows,
    ShardedRows,
    join_rows,
    on_grid,
    row_problem,
    scratch,
)
from grappa_dist.kmeans.seeding import Init, SeedingState, oversampled_centroids, seed_centroids
from grappa_dist.kmeans.update import Stats, finish
from grappa_dist.kmeans.yinyang import Bounds, Drift, GroupedCentroids, Groups, Reassignments, num_bounds, reassign
from grappa_dist.search.candidates import Centroids, joined
from grappa_dist.search.fixed_point import GRID, to_grid


def shared_pass(wanted: Sequence[tuple[BoundedPasses, Tensor]]) -> list[Centroids]:
    """Makes each of several clusterings of one share the one by these centroids, reading the rows once for all."""
    sharded = wanted[0][0].sharded
    assert all(kept.sharded is sharded for kept, _ in wanted)
    passes = [_Pass.of(kept, centroids) for kept, centroids in wanted]

    def work(block: RowBlock) -> list[Reassignments]:
        return [one.over(block) for one in passes]

    for found in sharded.each(work, sharded.row_blocks()):
        for one, moves in zip(passes, found, strict=True):
            one.kept.by_integers += moves.by_integers
            one.kept.searched += moves.searched
    for one in passes:
        one.end()
    return [one.grouped.whole for one in passes]


@dataclass
class BoundedPasses:
    """An exact k-means between its passes over the rows: labels, bounds of distances that spare most of the search, and
    what the rows of a label add up to, which only rows that change their label change."""

    sharded: ShardedRows
    groups: Groups
    bounds: Bounds  # of the good rows, in their order
    stats: Stats  # of all ranks
    centroids: Tensor  # of the last pass
    number: int = 0
    by_integers: int = 0  # rows of this rank that no float could settle, over all passes
    searched: int = 0  # distances that it estimated

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

    def labels(self) -> list[np.ndarray]:
        """Of the rank's rows by shard, (P,) int32, -1 for bad rows."""
        parts, first = [], 0
        for good in self.sharded.rows.good:
            part = np.full(len(good), -1, dtype=np.int32)
            part[good] = self.bounds.labels[first : first + int(good.sum())].numpy()
            parts.append(part)
            first += int(good.sum())
        return parts


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
        moves = reassign(block.take, self.grouped, bounds)
        part.copy_(bounds)
        if len(moves.rows):
            x, squares = joined(block.take(moves.rows)), bounds.squares[moves.rows]
            with self.adding:
                self.change.add_(x, squares, moves.after, moves.before if self.drift else None)
        return moves

    def end(self) -> None:
        self.kept.centroids, self.kept.number = self.grouped.whole.values, self.kept.number + 1
        self.kept.stats.add_changes_(self.change, self.kept.sharded.total)


SQUARE_UNIT = 1 / GRID**2  # of exact squared distances
Finish = Callable[[Tensor, list[int], int], tuple[Tensor, int]]
"""(centroids (K, D), spreads, step) -> new centroids and how many empty clusters were repaired."""


class Passes(Protocol):
    """What passes over a share's rows keep."""

    sharded: ShardedRows
    stats: Stats  # of all ranks, by the labels of the last pass


@dataclass(frozen=True)
class KMeansState:
    """Where k-means stands after an update, or before the first one: enough to go on from, with the same result."""

    centroids: np.ndarray  # (K, D) float32, after the update; (0, D) while the initialisation is under way
    inertia: tuple[int, ...]  # exact, before each update, in units of 2**-48
    repaired: int = 0
    seeded: SeedingState | None = None  # how far the initialisation is, while it is under way

    def problem(self) -> str:
        """What is wrong with the centroids, "" when nothing is: exact arithmetic needs values on the grid."""
        if self.centroids.ndim != 2 or self.centroids.dtype != np.float32:
            return f"centroids must be (K, D) float32, found {self.centroids.shape} {self.centroids.dtype}"
        if on_grid(self.centroids):
            return ""
        wrong = next(i for i, row in enumerate(self.centroids) if not on_grid(row[None]))
        finite = np.isfinite(self.centroids[wrong]).all()
        return f"centroid {wrong} " + ("is off the grid of exact arithmetic" if finite else "is not finite")


Steps = Generator[Tensor, Centroids, KMeansState]
"""Yields the centroids of each pass, is sent them prepared when the pass is over, and returns where it all ends."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How often centroids are updated, and who is told."""

    iterations: int = 20  # updates at most; fewer when centroids no longer move
    tolerance: float = 0.0  # stop when an update lowers inertia by less than this share of it; 0: never
    spherical: bool = False  # centroids are normalised after every update
    on_iteration: Callable[[int, float], None] = lambda iteration, inertia: None  # updates so far, what they led to
    on_update: Callable[[KMeansState], None] = lambda progress: None  # what a later call can go on from

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, got {self.tolerance}")


def lloyd(
    passes: Passes, advance: Callable[[Tensor], Centroids], finish: Finish, start: KMeansState, how: Updates
) -> KMeansState:
    """The last centroids, with their inertia as the last entry; the passes hold the labels that belong to them.

    Args:
        advance: makes `passes` those of some centroids, which it returns prepared.
        start: where to go on from, as `how.on_update` was told.
    """
    iterations = lloyd_steps(passes, finish, start, how)
    try:
        centroids = next(iterations)
        while True:
            centroids = iterations.send(advance(centroids))
    except StopIteration as end:
        last: KMeansState = end.value
        return last


def lloyd_steps(passes: Passes, finish: Finish, start: KMeansState, how: Updates) -> Steps:
    """The same for a caller who makes the passes."""
    centroids = torch.from_numpy(start.centroids).to(passes.sharded.device)
    inertia, repaired = list(start.inertia), start.repaired
    for step in range(len(inertia), how.iterations + 1):
        prepared = yield centroids
        spreads = passes.stats.spreads(prepared)
        inertia.append(sum(spreads))
        how.on_iteration(step, inertia[-1] * SQUARE_UNIT)
        if step == how.iterations or (step and _at_rest(inertia[-2], inertia[-1], how.tolerance)):
            break
        updated, splits = finish(centroids, spreads, step)
        if not splits and torch.equal(updated, centroids):
            break  # every further step would be this one
        centroids, repaired = updated, repaired + splits
        how.on_update(KMeansState(centroids.cpu().numpy(), tuple(inertia), repaired))
    return KMeansState(centroids.cpu().numpy(), tuple(inertia), repaired)


def _at_rest(before: int, now: int, tolerance: float) -> bool:
    """Whether inertia fell by too little; it may even rise where means are normalised."""
    return tolerance > 0 and before - now < tolerance * before


@dataclass(frozen=True)
class KMeansResult:
    """The same on every rank, except for `labels`, which are those of the rank's own rows."""

    centroids: np.ndarray  # (K, D) float32
    labels: list[np.ndarray]  # for each own shard (P,) int32, -1 for bad rows; nearest to `centroids`
    counts: np.ndarray  # (K,) int64, rows per label
    inertia: list[float]  # sum of squared distances before each update, then that of the returned labels
    empty_repaired: int  # empty clusters given a part of another, over all iterations
    empty_left: int  # labels without a row
    exact_share: float  # of all assignments, those that took integers; depends on ranks, blocks and machine
    searched_share: float  # of all distances to all centroids, those that bounds did not spare; likewise


@dataclass(frozen=True, kw_only=True)
class KMeans(Updates):
    """How to make one k-means; all ranks say the same."""

    seed: int = 0
    init: Init = "k-means++"  # how first centroids are found
    initial: np.ndarray | None = None  # first centroids (K, D) that are given instead
    resume: KMeansState | None = None  # what `on_update` was told last, to go on from there
    on_seeding: Callable[[int, int], None] = lambda found, wanted: None  # rows drawn to start from, after every round


def sharded_kmeans(
    comm: Comm,
    rows: Rows,
    num_labels: int,
    how: KMeans | None = None,
    *,
    block_rows: int = BLOCK_ROWS,
    device: torch.device | str = "cpu",
) -> KMeansResult:
    """k-means of the good rows of all ranks, as `kmeans`. All ranks call it with the same settings."""
    return kmeans(join_rows(comm, rows, block_rows=block_rows, device=torch.device(device)), num_labels, how)


def kmeans(sharded: ShardedRows, num_labels: int, how: KMeans | None = None) -> KMeansResult:
    """k-means by itself."""
    return run_fit(begin(sharded, num_labels, how or KMeans()))


def run_fit(fit: Fit) -> KMeansResult:
    """Goes on with one fit until it ends."""
    return next(run_fits([fit])).result()


def run_fits(fits: list[Fit]) -> Iterator[Fit]:
    """Goes on with all fits of one share side by side, and gives each when it ends: a pass over the rows serves all.

    Uses the list up, so that what has ended need not stay in memory until the last one does.
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
    """A k-means under way: it waits for a pass over the rows with its centroids, until it has ended."""

    passes: BoundedPasses
    steps: Steps
    centroids: Tensor  # (K, D) of the pass that comes next
    end: KMeansState | None = None  # once there is no other pass to make

    def after_pass(self, prepared: Centroids) -> None:
        """Updates the centroids, which the pass has prepared, or ends."""
        try:
            self.centroids = self.steps.send(prepared)
        except StopIteration as stop:
            self.end = stop.value

    def result(self) -> KMeansResult:
        """What has come of it."""
        passes, end = self.passes, self.end
        assert end is not None
        counts = passes.stats.counts.cpu().numpy()
        told = passes.sharded.total(torch.tensor([passes.by_integers, passes.searched]))
        by_integers, searched = told.tolist()
        decisions = passes.sharded.num_good * passes.number
        return KMeansResult(
            centroids=end.centroids,
            labels=passes.labels(),
            counts=counts,
            inertia=[i * SQUARE_UNIT for i in end.inertia],
            empty_repaired=end.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=by_integers / decisions,
            searched_share=searched / (decisions * len(end.centroids)),
        )


def begin(sharded: ShardedRows, num_labels: int, how: KMeans) -> Fit:
    """First centroids, and then Lloyd's iterations before their first pass. All ranks call it with the same settings.

    `how.on_update` is told after every round of the initialisation, after all of it, and after every update.

    Raises:
        ValueError: there are not so many good rows, or `how.initial` or `how.resume` do not fit.
        Stopped: on all ranks, when any was asked to stop.
    """
    sharded.check_labels(num_labels)
    shape, start = (num_labels, sharded.dim), how.resume
    if start is not None:
        _check_resume(start, shape, how.iterations)
    if start is None or start.seeded:
        start = KMeansState(_first_centroids(sharded, shape, how).cpu().numpy(), ())
        how.on_update(start)
    return _iterating(sharded, start, how)


def _first_centroids(sharded: ShardedRows, shape: tuple[int, int], how: KMeans) -> Tensor:
    if how.initial is not None:
        return _checked_initial(how.initial, shape)

    def told(seeded: SeedingState, wanted: int) -> None:
        how.on_seeding(len(seeded.places), wanted)
        how.on_update(KMeansState(np.zeros((0, shape[1]), np.float32), (), seeded=seeded))

    seeded = how.resume.seeded if how.resume else None
    first_centroids = seed_centroids if how.init == "k-means++" else oversampled_centroids
    return first_centroids(sharded, shape[0], how.seed, resume=seeded, on_round=told)


def _check_resume(resume: KMeansState, shape: tuple[int, int], iterations: int) -> None:
    if problem := resume.problem():
        raise ValueError(f"resume: {problem}")
    if (resume.centroids.shape != shape and not resume.seeded) or len(resume.inertia) > iterations:
        raise ValueError(
            f"resume has {resume.centroids.shape} centroids after {len(resume.inertia)} updates, "
            f"expected {shape} after at most {iterations}"
        )


def _iterating(sharded: ShardedRows, start: KMeansState, how: Updates) -> Fit:
    passes = BoundedPasses.over(sharded, torch.from_numpy(start.centroids).to(sharded.device))

    def finish_all(centroids: Tensor, spreads: list[int], step: int) -> tuple[Tensor, int]:
        return finish(centroids, passes.stats, spreads, step, spherical=how.spherical)

    steps = lloyd_steps(passes, finish_all, start, how)
    return Fit(passes, steps, next(steps))


def _checked_initial(initial: np.ndarray, shape: tuple[int, int]) -> Tensor:
    if initial.shape != shape:
        raise ValueError(f"initial centroids must be {shape}, found {initial.shape}")
    if found := row_problem(initial, np.ones(len(initial), dtype=bool)):
        raise ValueError(f"initial centroids: row {found[0]} {found[1]}")
    return to_grid(torch.from_numpy(initial.astype(np.float32)))
