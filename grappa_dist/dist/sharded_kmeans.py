"""k-means over the ranks of one job: the same result on any number of ranks, for any split of the rows and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (ops/kmeans.py) and every number that travels is an integer.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.dist.comm import Comm
from grappa_dist.dist.lloyd import SQUARE_UNIT, Progress, Steps, Updates, lloyd_steps
from grappa_dist.dist.passes import BoundedPasses, advance_together
from grappa_dist.dist.search import Rows, row_problem
from grappa_dist.dist.sharded_seeding import seed_centroids
from grappa_dist.dist.share import BLOCK_ROWS, Share, join_rows
from grappa_dist.ops.exact import to_grid
from grappa_dist.ops.kmeans import finish
from grappa_dist.ops.proposals import Centroids


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


def sharded_kmeans(
    comm: Comm,
    rows: Rows,
    num_labels: int,
    *,
    block_rows: int = BLOCK_ROWS,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> KMeansResult:
    """k-means of the good rows of all ranks, as `kmeans` with its settings. All ranks call it with the same ones."""
    return kmeans(join_rows(comm, rows, block_rows=block_rows, device=torch.device(device)), num_labels, **settings)


def kmeans(share: Share, num_labels: int, **settings: Any) -> KMeansResult:
    """k-means by itself, with the settings of `begin`."""
    return end_alone(begin(share, num_labels, **settings))


def end_alone(fit: Fit) -> KMeansResult:
    """Goes on with one fit until it ends."""
    return next(end_together([fit])).result()


def end_together(fits: list[Fit]) -> Iterator[Fit]:
    """Goes on with all fits of one share side by side, and gives each when it ends: a pass over the rows serves all.

    Uses the list up, so that what has ended need not stay in memory until the last one does.
    """
    while fits:
        prepared = advance_together([(fit.passes, fit.wanted) for fit in fits])
        for fit, centroids in zip(fits, prepared, strict=True):
            fit.go_on(centroids)
        ended = [fit for fit in fits if fit.last]
        fits[:] = [fit for fit in fits if not fit.last]
        del prepared, fit
        while ended:
            yield ended.pop(0)


@dataclass(eq=False)
class Fit:
    """A k-means under way: it waits for a pass with the centroids that it wants, until it has ended."""

    passes: BoundedPasses
    steps: Steps
    wanted: Tensor  # (K, D)
    last: Progress | None = None  # once it has ended

    def go_on(self, prepared: Centroids) -> None:
        """After the pass that was wanted."""
        try:
            self.wanted = self.steps.send(prepared)
        except StopIteration as end:
            self.last = end.value

    def result(self) -> KMeansResult:
        """What has come of it."""
        passes, last = self.passes, self.last
        assert last is not None
        counts = passes.stats.counts.cpu().numpy()
        told = passes.share.total(torch.tensor([passes.by_integers, passes.searched]))
        by_integers, searched = told.tolist()
        decisions = passes.share.num_good * passes.number
        return KMeansResult(
            centroids=last.centroids,
            labels=passes.labels(),
            counts=counts,
            inertia=[i * SQUARE_UNIT for i in last.inertia],
            empty_repaired=last.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=by_integers / decisions,
            searched_share=searched / (decisions * len(last.centroids)),
        )


def begin(
    share: Share,
    num_labels: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = False,
    tolerance: float = 0.0,
    on_iteration: Callable[[int, float], None] = lambda iteration, inertia: None,
    initial: np.ndarray | None = None,
    resume: Progress | None = None,
    on_update: Callable[[Progress], None] = lambda progress: None,
) -> Fit:
    """k-means++, and then Lloyd's iterations before their first pass. All ranks call it with the same settings.

    Args:
        iterations: updates of the centroids at most; fewer when they no longer move.
        spherical: centroids are normalised after every update.
        tolerance: stop when an iteration lowers inertia by less than this share of it; 0 never does.
        on_iteration: told the number of updates so far and the inertia they led to.
        initial: centroids (K, D) to start from instead of k-means++.
        resume: what `on_update` was told last, to go on from there.
        on_update: told what a later call can resume from, after the initialisation and after every update.
    """
    share.check_labels(num_labels)
    shape = (num_labels, share.dim)
    if resume is None:
        start = seed_centroids(share, num_labels, seed) if initial is None else _checked_initial(initial, shape)
        resume = Progress(start.cpu().numpy(), ())
        on_update(resume)
    _check_resume(resume, shape, iterations)
    how = Updates(
        iterations=iterations,
        tolerance=tolerance,
        spherical=spherical,
        on_iteration=on_iteration,
        on_update=on_update,
    )
    return _iterating(share, resume, how)


def _check_resume(resume: Progress, shape: tuple[int, int], iterations: int) -> None:
    if resume.centroids.shape != shape or len(resume.inertia) > iterations:
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
