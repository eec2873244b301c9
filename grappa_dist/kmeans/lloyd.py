"""k-means over the ranks of one job: the same result on any number of ranks, for any split of the rows and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (kmeans/update.py) and every number that travels is an integer.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.lloyd import SQUARE_UNIT, Progress, Steps, Updates, lloyd_steps
from grappa_dist.distributed.oversampling import oversampled_centroids
from grappa_dist.distributed.passes import BoundedPasses, advance_together
from grappa_dist.distributed.rows import Rows, row_problem
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, Share, join_rows
from grappa_dist.kmeans.seeding import Seeded, seed_centroids
from grappa_dist.kmeans.update import finish
from grappa_dist.ops.choice import Init
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import to_grid


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
    resume: Progress | None = None  # what `on_update` was told last, to go on from there
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


def kmeans(share: Share, num_labels: int, how: KMeans | None = None) -> KMeansResult:
    """k-means by itself."""
    return end_alone(begin(share, num_labels, how or KMeans()))


def end_alone(fit: Fit) -> KMeansResult:
    """Goes on with one fit until it ends."""
    return next(end_together([fit])).result()


def end_together(fits: list[Fit]) -> Iterator[Fit]:
    """Goes on with all fits of one share side by side, and gives each when it ends: a pass over the rows serves all.

    Uses the list up, so that what has ended need not stay in memory until the last one does.
    """
    while fits:
        prepared = advance_together([(fit.passes, fit.centroids) for fit in fits])
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
    end: Progress | None = None  # once there is no other pass to make

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
        told = passes.share.total(torch.tensor([passes.by_integers, passes.searched]))
        by_integers, searched = told.tolist()
        decisions = passes.share.num_good * passes.number
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


def begin(share: Share, num_labels: int, how: KMeans) -> Fit:
    """First centroids, and then Lloyd's iterations before their first pass. All ranks call it with the same settings.

    `how.on_update` is told after every round of the initialisation, after all of it, and after every update.

    Raises:
        ValueError: there are not so many good rows, or `how.initial` or `how.resume` do not fit.
        Stopped: on all ranks, when any was asked to stop.
    """
    share.check_labels(num_labels)
    shape, start = (num_labels, share.dim), how.resume
    if start is not None:
        _check_resume(start, shape, how.iterations)
    if start is None or start.seeded:
        start = Progress(_first_centroids(share, shape, how).cpu().numpy(), ())
        how.on_update(start)
    return _iterating(share, start, how)


def _first_centroids(share: Share, shape: tuple[int, int], how: KMeans) -> Tensor:
    if how.initial is not None:
        return _checked_initial(how.initial, shape)

    def told(seeded: Seeded, wanted: int) -> None:
        how.on_seeding(len(seeded.places), wanted)
        how.on_update(Progress(np.zeros((0, shape[1]), np.float32), (), seeded=seeded))

    seeded = how.resume.seeded if how.resume else None
    first_centroids = seed_centroids if how.init == "k-means++" else oversampled_centroids
    return first_centroids(share, shape[0], how.seed, resume=seeded, on_round=told)


def _check_resume(resume: Progress, shape: tuple[int, int], iterations: int) -> None:
    if problem := resume.problem():
        raise ValueError(f"resume: {problem}")
    if (resume.centroids.shape != shape and not resume.seeded) or len(resume.inertia) > iterations:
        raise ValueError(
            f"resume has {resume.centroids.shape} centroids after {len(resume.inertia)} updates, "
            f"expected {shape} after at most {iterations}"
        )


def _iterating(share: Share, start: Progress, how: Updates) -> Fit:
    passes = BoundedPasses.over(share, torch.from_numpy(start.centroids).to(share.device))

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
