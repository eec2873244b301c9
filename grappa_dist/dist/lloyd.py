"""Lloyd's iterations around any pass: those of the methods that shorten the assignment.

Shapes: K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.dist.row_labels import Passes
from grappa_dist.dist.sharded_kmeans import SQUARE_UNIT, Progress
from grappa_dist.ops.proposals import Centroids

Finish = Callable[[Tensor, list[int], int], tuple[Tensor, int]]
"""(centroids (K, D), spreads, step) -> new centroids and how many empty clusters were repaired."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How often centroids are updated, and who is told."""

    iterations: int
    tolerance: float
    spherical: bool
    on_iteration: Callable[[int, float], None]
    on_update: Callable[[Progress], None]


def lloyd(passes: Passes, advance: Callable[[Tensor], None], finish: Finish, start: Progress, how: Updates) -> Progress:
    """The last centroids, with their inertia as the last entry; the passes hold the labels that belong to them.

    Args:
        advance: makes `passes` those of some centroids.
        start: where to go on from, as `how.on_update` was told.
    """
    centroids = torch.from_numpy(start.centroids).to(passes.share.device)
    inertia, repaired = list(start.inertia), start.repaired
    for step in range(len(inertia), how.iterations + 1):
        advance(centroids)
        spreads = passes.stats.spreads(Centroids.of(centroids))
        inertia.append(sum(spreads))
        how.on_iteration(step, inertia[-1] * SQUARE_UNIT)
        if step == how.iterations or (step and inertia[-2] - inertia[-1] < how.tolerance * inertia[-2]):
            break
        updated, splits = finish(centroids, spreads, step)
        if not splits and torch.equal(updated, centroids):
            break
        centroids, repaired = updated, repaired + splits
        how.on_update(Progress(centroids.cpu().numpy(), tuple(inertia), repaired))
    return Progress(centroids.cpu().numpy(), tuple(inertia), repaired)
