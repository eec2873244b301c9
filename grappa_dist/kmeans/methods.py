"""The ways to cluster, from exact k-means to shortcuts for many rows and labels, and a bound on sizes.

All give the same bits on any number of ranks, for any split of the rows and any size of blocks, and go on from what
`on_update` was told last to the same end.

Shapes: n rows of all ranks, K centroids, C coarse ones, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
import torch

from grappa_dist.distributed.lloyd import SQUARE_UNIT, Progress
from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.kmeans.assignments import RowLabels, Settled, exactly, find_labels
from grappa_dist.kmeans.balanced import Balanced, balance_labels, largest_size
from grappa_dist.kmeans.hierarchical import fit_in_families
from grappa_dist.kmeans.ivf import Agreement, agreement, refine, through_lists
from grappa_dist.kmeans.lloyd import Fit, KMeans, KMeansResult, begin, end_alone
from grappa_dist.kmeans.sampling import sampled_share
from grappa_dist.ops.choice import Choice
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.rerank import Assignment, pair_squares

Trail = Mapping[str, Progress]
"""Where the parts of a method stand; enough to go on from."""

_SAMPLE = 1  # names draws


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to cluster; all of it changes the result."""

    choice: Choice
    iterations: int = 20
    tolerance: float = 0.0
    spherical: bool = False
    sample_rows_per_cluster: int = 64
    probes: int = 8
    balance: float | None = None  # largest cluster as a multiple of n / K
    restarts: int = 1


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Labels and centroids, and what the method cost in exactness."""

    result: KMeansResult
    updates: int  # of the centroids (K, D), in the last part of the method
    sampled_rows: int  # that the centroids were fitted to
    agreement: Agreement | None = None  # with the exact assignment, where it was not exact
    unbalanced_inertia: float | None = None  # before rows were moved for the bound on sizes
    balanced: Balanced | None = None
    restarts: tuple[float, ...] = ()  # inertia of each, where there were several


@dataclass(frozen=True)
class Told:
    """Who is told how it goes."""

    on_iteration: Callable[[str, int, float], None] = lambda part, iteration, inertia: None
    on_seeding: Callable[[str, int, int], None] = lambda part, found, wanted: None  # first centroids of a part
    on_update: Callable[[Trail], None] = lambda trail: None


@dataclass(frozen=True)
class Restart:
    """One run of a method, of which there may be several with other seeds."""

    share: Share
    num_labels: int
    method: Method
    seed: int
    number: int
    kept: dict[str, Progress]  # of all restarts, changed in place
    told: Told

    @property
    def done(self) -> str:
        return f"{self.number}/done"

    def cluster(self) -> Clustering:
        ways = {
            "exact": self._exact,
            "sampled": self._sampled,
            "hierarchical": self._hierarchical,
            "approximate": self._approximate,
        }
        return ways[self.method.choice.name]()

    def begin_exact(self) -> Fit:
        """Plain k-means before its first pass."""
        return self._fit(self.share, "fit", self.num_labels)

    def end_exact(self, result: KMeansResult) -> Clustering:
        """What it comes to once the passes are over."""
        found = Clustering(result=result, updates=len(result.inertia) - 1, sampled_rows=self.share.num_good)
        if self.method.balance is None:
            return found
        return self._balanced(found, _own_distances(self.share, result))

    def _exact(self) -> Clustering:
        return self.end_exact(self._kmeans(self.share, "fit", self.num_labels))

    def _sampled(self) -> Clustering:
        num = self.num_labels * self.method.sample_rows_per_cluster
        sample = sampled_share(self.share, num, self.seed, self.num_labels, _SAMPLE)
        fit = self._kmeans(sample, "fit", self.num_labels)
        found = self._labelled(Progress(fit.centroids, (), fit.empty_repaired), len(fit.inertia) - 1)
        return replace(found, sampled_rows=sample.num_good)

    def _hierarchical(self) -> Clustering:
        fit = self._families()
        return self._labelled(fit, len(fit.inertia) - 1)

    def _approximate(self) -> Clustering:
        start = self.kept.get(self._name("refined"))
        if start is None:
            start = Progress(self._families().centroids, ())
            for part in ("coarse", "fine"):
                self.kept.pop(self._name(part))
            self._keep("refined", start)
        fit, passes = refine(self.share, self.method.probes, start, self._how("refined"))
        if self.method.choice.assignment == "exact":
            return self._labelled(fit, len(fit.inertia) - 1)
        told = self.share.total(torch.tensor([passes.undecided, passes.searched]))
        return self._told(fit, len(fit.inertia) - 1, passes.rows, told.tolist())

    def _families(self) -> Progress:
        """Centroids by the two levels."""
        heads, start = self.kept.get(self._name("coarse")), self.kept.get(self._name("fine"))
        if heads is None or start is None:  # all of the coarse ones' updates are over when there are fine ones
            num = isqrt(self.num_labels)
            heads = Progress(self._kmeans(self.share, "coarse", num).centroids, ())
        how = self._how("fine")
        return fit_in_families(self.share, heads.centroids, self.num_labels, seed=self.seed, start=start, how=how)

    def _kmeans(self, share: Share, part: str, num_labels: int) -> KMeansResult:
        return end_alone(self._fit(share, part, num_labels))

    def _fit(self, share: Share, part: str, num_labels: int) -> Fit:
        return begin(share, num_labels, self._how(part))

    def _labelled(self, fit: Progress, updates: int) -> Clustering:
        """All rows by their nearest centroid, exactly or through lists."""
        centroids = torch.from_numpy(fit.centroids).to(self.share.device)
        exact = self.method.choice.assignment == "exact"
        work = exactly(self.share, centroids) if exact else through_lists(centroids, self.method.probes)
        rows, told = find_labels(self.share, work, self.share.blocks())
        fit = replace(fit, inertia=(*fit.inertia, rows.inertia(self.share)))
        return self._told(fit, updates, rows, told.tolist())

    def _told(self, fit: Progress, updates: int, rows: RowLabels, told: list[int]) -> Clustering:
        counts = rows.counts(self.share, self.num_labels)
        result = KMeansResult(
            centroids=fit.centroids,
            labels=rows.by_shard(self.share),
            counts=counts.numpy(),
            inertia=[i * SQUARE_UNIT for i in fit.inertia],
            empty_repaired=fit.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=told[0] / self.share.num_good,
            searched_share=told[1] / (self.share.num_good * self.num_labels),
        )
        found = Clustering(result=result, updates=updates, sampled_rows=self.share.num_good)
        if self.method.choice.assignment == "approximate":
            centroids = torch.from_numpy(fit.centroids).to(self.share.device)
            found = replace(found, agreement=agreement(self.share, rows, centroids, self.seed))
        return found if self.method.balance is None else self._balanced(found, rows)

    def _balanced(self, found: Clustering, rows: RowLabels) -> Clustering:
        assert self.method.balance is not None
        largest = largest_size(self.share.num_good, self.num_labels, self.method.balance)
        centroids = torch.from_numpy(found.result.centroids).to(self.share.device)
        balanced = balance_labels(self.share, rows, centroids, largest)
        counts = rows.counts(self.share, self.num_labels)
        *before, unbalanced = found.result.inertia
        result = replace(
            found.result,
            labels=rows.by_shard(self.share),
            counts=counts.numpy(),
            inertia=[*before, rows.inertia(self.share) * SQUARE_UNIT],
            empty_left=int((counts == 0).sum()),
        )
        return replace(found, result=result, balanced=balanced, unbalanced_inertia=unbalanced)

    def _name(self, part: str) -> str:
        return f"{self.number}/{part}"

    def _keep(self, part: str, progress: Progress) -> None:
        self.kept[self._name(part)] = progress
        self.told.on_update(self.kept)

    def _words(self, part: str) -> str:
        """What a person is told of it, before what happens there."""
        several = f"restart {self.number + 1}, " if self.method.restarts > 1 else ""
        return several + ("" if part == "fit" else f"{part} ")

    def _how(self, part: str) -> KMeans:
        method, told, words = self.method, self.told, self._words(part)
        return KMeans(
            iterations=method.iterations,
            tolerance=method.tolerance,
            spherical=method.spherical,
            seed=self.seed,
            init=method.choice.init,
            resume=self.kept.get(self._name(part)),
            on_seeding=lambda found, wanted: told.on_seeding(words, found, wanted),
            on_iteration=lambda iteration, inertia: told.on_iteration(words, iteration, inertia),
            on_update=lambda progress: self._keep(part, progress),
        )


def _own_distances(share: Share, result: KMeansResult) -> RowLabels:
    """The labels that k-means gave, with the exact squared distances that belong to them."""
    labels = torch.from_numpy(np.concatenate(result.labels)) if result.labels else torch.zeros(0, dtype=torch.int32)
    centroids = Centroids.of(torch.from_numpy(result.centroids).to(share.device))

    def work(block: tuple[torch.Tensor, torch.Tensor]) -> Settled:
        positions, x = block
        own = labels[positions].long().to(x.device)
        pairs = (torch.arange(len(x), device=x.device), own)
        squares = pair_squares(x, exact_square(x), centroids, pairs)
        return Settled(positions, x, Assignment(own, squares.long()), 0)

    return find_labels(share, work, share.blocks())[0]
