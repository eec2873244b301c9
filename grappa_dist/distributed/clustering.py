"""Clusterings of a share: the best of some restarts, and several numbers of labels at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from grappa_dist.distributed.lloyd import SQUARE_UNIT, Progress
from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.kmeans.lloyd import Fit, end_together
from grappa_dist.kmeans.methods import Clustering, Method, Restart, Told, Trail
from grappa_dist.ops.seeding import draw

_RESTART = 0  # names draws


@dataclass(frozen=True)
class Wanted:
    """One clustering to be made."""

    num_labels: int
    method: Method
    seed: int = 0
    trail: Trail = field(default_factory=dict)  # what `told.on_update` was told last, to go on from there
    told: Told = field(default_factory=Told)


def shares_passes(method: Method) -> bool:
    """Whether its passes over the rows can serve other clusterings too: those of plain exact k-means."""
    return method.choice.name == "exact" and method.restarts == 1


def cluster_together(share: Share, wanted: Iterable[Wanted]) -> Iterator[tuple[int, Clustering]]:
    """Clusterings that share their passes over the rows, with their place among those wanted, each when it is done.

    Every one is what `cluster` makes of it alone.

    Args:
        wanted: asked for one by one, each when its initialisation is due; `shares_passes` of all.
    """
    under_way: dict[Fit, tuple[int, Restart]] = {}
    for place, one in enumerate(wanted):
        assert shares_passes(one.method)
        run = _first_run(share, one)
        under_way[run.begin_exact()] = (place, run)
    for fit in end_together(list(under_way)):
        place, run = under_way.pop(fit)
        yield place, run.end_exact(fit.result())


def cluster(share: Share, wanted: Wanted) -> Clustering:
    """The clustering of lowest inertia among the restarts, the first of equal ones."""
    first = _first_run(share, wanted)
    if wanted.method.restarts == 1:
        return first.cluster()
    kept, told = first.kept, first.told
    seeds = (draw(2**63, wanted.seed, number, _RESTART) for number in range(1, wanted.method.restarts))
    runs = [first, *(replace(first, seed=seed, number=number) for number, seed in enumerate(seeds, start=1))]
    found: dict[int, Clustering] = {}
    for run in runs:
        if run.done not in kept:
            found = {run.number: run.cluster()}
            inertia = round(found[run.number].result.inertia[-1] / SQUARE_UNIT)
            kept[run.done] = Progress(np.zeros((0, share.dim), np.float32), (inertia,))
            _keep_only(kept, _best(kept, runs[: run.number + 1]))
            told.on_update(kept)
    best = _best(kept, runs)
    if best.number not in found:  # only the passes after its last update are made again
        found[best.number] = best.cluster()
    return replace(found[best.number], restarts=tuple(kept[run.done].inertia[0] * SQUARE_UNIT for run in runs))


def _first_run(share: Share, wanted: Wanted) -> Restart:
    share.check_labels(wanted.num_labels)
    return Restart(share, wanted.num_labels, wanted.method, wanted.seed, 0, dict(wanted.trail), wanted.told)


def _best(kept: Trail, runs: list[Restart]) -> Restart:
    return min(runs, key=lambda run: (kept[run.done].inertia[0], run.number))


def _keep_only(kept: dict[str, Progress], best: Restart) -> None:
    """Forgets the centroids of all other restarts."""
    for key in [k for k in kept if not k.endswith("/done") and not k.startswith(f"{best.number}/")]:
        del kept[key]
