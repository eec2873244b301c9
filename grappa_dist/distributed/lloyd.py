"""Lloyd's iterations around any pass: exact ones with bounds, and those that shorten the assignment.

Shapes: K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.rows import on_grid
from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.kmeans.seeding import Seeded
from grappa_dist.kmeans.update import Stats
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID

SQUARE_UNIT = 1 / GRID**2  # of exact squared distances
Finish = Callable[[Tensor, list[int], int], tuple[Tensor, int]]
"""(centroids (K, D), spreads, step) -> new centroids and how many empty clusters were repaired."""


class Passes(Protocol):
    """What passes over a share's rows keep."""

    share: Share
    stats: Stats  # of all ranks, by the labels of the last pass


@dataclass(frozen=True)
class Progress:
    """Where k-means stands after an update, or before the first one: enough to go on from, with the same result."""

    centroids: np.ndarray  # (K, D) float32, after the update; (0, D) while the initialisation is under way
    inertia: tuple[int, ...]  # exact, before each update, in units of 2**-48
    repaired: int = 0
    seeded: Seeded | None = None  # how far the initialisation is, while it is under way

    def problem(self) -> str:
        """What is wrong with the centroids, "" when nothing is: exact arithmetic needs values on the grid."""
        if self.centroids.ndim != 2 or self.centroids.dtype != np.float32:
            return f"centroids must be (K, D) float32, found {self.centroids.shape} {self.centroids.dtype}"
        if on_grid(self.centroids):
            return ""
        wrong = next(i for i, row in enumerate(self.centroids) if not on_grid(row[None]))
        finite = np.isfinite(self.centroids[wrong]).all()
        return f"centroid {wrong} " + ("is off the grid of exact arithmetic" if finite else "is not finite")


Steps = Generator[Tensor, Centroids, Progress]
"""Yields the centroids of each pass, is sent them prepared when the pass is over, and returns where it all ends."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How often centroids are updated, and who is told."""

    iterations: int = 20  # updates at most; fewer when centroids no longer move
    tolerance: float = 0.0  # stop when an update lowers inertia by less than this share of it; 0: never
    spherical: bool = False  # centroids are normalised after every update
    on_iteration: Callable[[int, float], None] = lambda iteration, inertia: None  # updates so far, what they led to
    on_update: Callable[[Progress], None] = lambda progress: None  # what a later call can go on from

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, got {self.tolerance}")


def lloyd(
    passes: Passes, advance: Callable[[Tensor], Centroids], finish: Finish, start: Progress, how: Updates
) -> Progress:
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
        last: Progress = end.value
        return last


def lloyd_steps(passes: Passes, finish: Finish, start: Progress, how: Updates) -> Steps:
    """The same for a caller who makes the passes."""
    centroids = torch.from_numpy(start.centroids).to(passes.share.device)
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
        how.on_update(Progress(centroids.cpu().numpy(), tuple(inertia), repaired))
    return Progress(centroids.cpu().numpy(), tuple(inertia), repaired)


def _at_rest(before: int, now: int, tolerance: float) -> bool:
    """Whether inertia fell by too little; it may even rise where means are normalised."""
    return tolerance > 0 and before - now < tolerance * before
