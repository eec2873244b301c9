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

from grappa_dist.dist.share import Share
from grappa_dist.ops.exact import GRID
from grappa_dist.ops.kmeans import Stats
from grappa_dist.ops.proposals import Centroids

SQUARE_UNIT = 1 / GRID**2  # of exact squared distances
Finish = Callable[[Tensor, list[int], int], tuple[Tensor, int]]
"""(centroids (K, D), spreads, step) -> new centroids and how many empty clusters were repaired."""


class Passes(Protocol):
    """What passes over a share's rows keep."""

    share: Share
    stats: Stats  # of all ranks, by the labels of the last pass


@dataclass(frozen=True)
class Progress:
    """Where Lloyd's iterations stand after an update: enough to go on from, with the result of an unbroken run."""

    centroids: np.ndarray  # (K, D) float32, after the update
    inertia: tuple[int, ...]  # exact, before each update, in units of 2**-48
    repaired: int = 0


Steps = Generator[Tensor, Centroids, Progress]
"""Yields the centroids of each pass, is sent them prepared when the pass is over, and returns where it all ends."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How often centroids are updated, and who is told."""

    iterations: int
    tolerance: float
    spherical: bool
    on_iteration: Callable[[int, float], None]
    on_update: Callable[[Progress], None]


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
        if step == how.iterations or (step and inertia[-2] - inertia[-1] < how.tolerance * inertia[-2]):
            break
        updated, splits = finish(centroids, spreads, step)
        if not splits and torch.equal(updated, centroids):
            break  # every further step would be this one
        centroids, repaired = updated, repaired + splits
        how.on_update(Progress(centroids.cpu().numpy(), tuple(inertia), repaired))
    return Progress(centroids.cpu().numpy(), tuple(inertia), repaired)
