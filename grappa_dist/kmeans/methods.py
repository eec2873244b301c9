"""The ways to cluster, from exact k-means to shortcuts for many rows and labels, and a bound on sizes.

All give the same bits on any number of ranks, for any split of the rows and any size of blocks, and go on from what
`on_update` was told last to the same end.

Shapes: n rows of all ranks, K centroids, C coarse ones, D dimensions.

Clusterings of a sharded: the best of some restarts, and several numbers of labels at the same time.

Which way to cluster, and why: a function of the numbers of rows, labels and updates alone, never of the machine.

The choice changes the labels, so it must be the same wherever the run goes on. The dimension is left out for a reason
of its own: artefacts are named before a backbone is built.

Shapes: n rows, K labels, I updates, C = sqrt(K) coarse clusters and as many lists, p probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Literal

import numpy as np
import torch

from grappa_dist.data.rng import RowDraw, draw
from grappa_dist.distributed.sharded_rows import ShardedRows
from grappa_dist.kmeans.assignments import AssignedRows, RowLabels, assign_rows, exactly
from grappa_dist.kmeans.balanced import Balanced, balance_labels, largest_size
from grappa_dist.kmeans.hierarchical import fit_subclusters
from grappa_dist.kmeans.ivf import Agreement, agreement, refine, through_lists
from grappa_dist.kmeans.lloyd import SQUARE_UNIT, Fit, KMeans, KMeansResult, KMeansState, begin, run_fit, run_fits
from grappa_dist.kmeans.sampling import sample_rows
from grappa_dist.kmeans.seeding import Init
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.rerank import Assignment, pair_squares

Name = Literal["exact", "sampled", "hierarchical", "approximate"]
AssignmentKind = Literal["exact", "approximate"]
FLAT: tuple[Name, ...] = ("exact", "sampled")
"""Methods that fit all centroids at once, not on two levels."""

PAIRS = 5 * 10**13
"""Pairs of row and centroid that `auto` spends on one part: about a day and a half of one core (docs/scale.md)."""

PLUS_PLUS_LABELS, PLUS_PLUS_ROWS = 2**17, 8
"""`auto` draws up to so many centroids by k-means++, which reads the rows the more often the more there are; and all of
them where there are fewer rows per centroid than that, since k-means|| would have most rows for candidates."""


@dataclass(frozen=True)
class Size:
    """What the cost depends on."""

    rows: int
    labels: int
    iterations: int
    probes: int

    def fit_pairs(self, name: Name, sample_rows: int = 0) -> int:
        """Pairs of row and centroid that a fit compares, bounds left aside.

        exact: n K (I + 1). hierarchical: n C (I + 1) for either level. approximate: the same, then per update n C heads
        and n p K / C centroids. sampled: m K (I + 1) for m sampled rows.
        """
        passes, level = self.iterations + 1, self.rows * isqrt(self.labels)
        two_levels = 2 * level * passes
        return {
            "exact": self.rows * self.labels * passes,
            "sampled": sample_rows * self.labels * passes,
            "hierarchical": two_levels,
            "approximate": two_levels + level * (1 + self.probes) * passes,
        }[name]


@dataclass(frozen=True)
class Choice:
    """How one K is clustered."""

    name: Name
    assignment: AssignmentKind  # of all rows, once the centroids stand
    reason: str
    init: Init = "k-means++"  # of the flat fit: of all centroids, or of the coarse ones where there are two levels


def choose(
    method: Name | Literal["auto"],
    assignment: AssignmentKind | Literal["auto"],
    init: Init | Literal["auto"],
    size: Size,
) -> Choice:
    """Settles what is `auto`: the method of lowest inertia whose fit is affordable, the assignment likewise."""
    name, reason = _method(method, size)
    assigned, because = _assignment(name, assignment, size)
    found = _init(init, size.rows, size.labels if name in FLAT else isqrt(size.labels))
    started = "; first centroids by k-means||" if found == "k-means||" else ""
    return Choice(name, assigned, reason + because + started, found)


def _assignment(name: Name, assignment: AssignmentKind | Literal["auto"], size: Size) -> tuple[AssignmentKind, str]:
    if name == "exact":
        return "exact", ""
    once = size.rows * size.labels
    if assignment != "auto":
        return assignment, f"; clustering.assignment is {assignment}"
    if once <= PAIRS:
        return "exact", f"; exact labels at the end take {once:.1e} pairs"
    return "approximate", f"; exact labels at the end would take {once:.1e} pairs"


def _init(init: Init | Literal["auto"], rows: int, labels: int) -> Init:
    if init != "auto":
        return init
    return "k-means||" if labels > PLUS_PLUS_LABELS and rows >= PLUS_PLUS_ROWS * labels else "k-means++"


def _method(method: Name | Literal["auto"], size: Size) -> tuple[Name, str]:
    if method != "auto":
        return method, f"clustering.method is {method}"
    exact, lists, levels = (size.fit_pairs(name) for name in ("exact", "approximate", "hierarchical"))
    if exact <= PAIRS:
        return "exact", f"exact k-means takes {exact:.1e} pairs of row and centroid, at most {PAIRS:.0e} are spent"
    too_dear = f"exact k-means would take {exact:.1e} pairs of row and centroid, more than {PAIRS:.0e}"
    if lists <= PAIRS:
        return "approximate", f"{too_dear}; two levels and updates through lists take {lists:.1e}"
    return "hierarchical", f"{too_dear}, and updates through lists {lists:.1e}; two levels take {levels:.1e}"


Checkpoint = Mapping[str, KMeansState]
"""Where the parts of a method stand; enough to go on from."""


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
class ClusteringCallbacks:
    """Who is told how it goes."""

    on_iteration: Callable[[str, int, float], None] = lambda part, iteration, inertia: None
    on_seeding: Callable[[str, int, int], None] = lambda part, found, wanted: None  # first centroids of a part
    on_update: Callable[[Checkpoint], None] = lambda checkpoint: None


@dataclass(frozen=True)
class Restart:
    """One run of a method, of which there may be several with other seeds."""

    sharded: ShardedRows
    num_labels: int
    method: Method
    seed: int
    number: int
    kept: dict[str, KMeansState]  # of all restarts, changed in place
    told: ClusteringCallbacks

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
        return self._fit(self.sharded, "fit", self.num_labels)

    def end_exact(self, result: KMeansResult) -> Clustering:
        """What it comes to once the passes are over."""
        found = Clustering(result=result, updates=len(result.inertia) - 1, sampled_rows=self.sharded.num_good)
        if self.method.balance is None:
            return found
        return self._balanced(found, _own_distances(self.sharded, result))

    def _exact(self) -> Clustering:
        return self.end_exact(self._kmeans(self.sharded, "fit", self.num_labels))

    def _sampled(self) -> Clustering:
        num = self.num_labels * self.method.sample_rows_per_cluster
        sample = sample_rows(self.sharded, num, *RowDraw.FIT_SAMPLE.key(self.seed, self.num_labels))
        fit = self._kmeans(sample, "fit", self.num_labels)
        found = self._labelled(KMeansState(fit.centroids, (), fit.empty_repaired), len(fit.inertia) - 1)
        return replace(found, sampled_rows=sample.num_good)

    def _hierarchical(self) -> Clustering:
        fit = self._families()
        return self._labelled(fit, len(fit.inertia) - 1)

    def _approximate(self) -> Clustering:
        start = self.kept.get(self._name("refined"))
        if start is None:
            start = KMeansState(self._families().centroids, ())
            for part in ("coarse", "fine"):
                self.kept.pop(self._name(part))
            self._keep("refined", start)
        fit, passes = refine(self.sharded, self.method.probes, start, self._how("refined"))
        if self.method.choice.assignment == "exact":
            return self._labelled(fit, len(fit.inertia) - 1)
        told = self.sharded.total(torch.tensor([passes.undecided, passes.searched]))
        return self._told(fit, len(fit.inertia) - 1, passes.rows, told.tolist())

    def _families(self) -> KMeansState:
        """Centroids by the two levels."""
        heads, start = self.kept.get(self._name("coarse")), self.kept.get(self._name("fine"))
        if heads is None or start is None:  # all of the coarse ones' updates are over when there are fine ones
            num = isqrt(self.num_labels)
            heads = KMeansState(self._kmeans(self.sharded, "coarse", num).centroids, ())
        how = self._how("fine")
        return fit_subclusters(self.sharded, heads.centroids, self.num_labels, seed=self.seed, start=start, how=how)

    def _kmeans(self, sharded: ShardedRows, part: str, num_labels: int) -> KMeansResult:
        return run_fit(self._fit(sharded, part, num_labels))

    def _fit(self, sharded: ShardedRows, part: str, num_labels: int) -> Fit:
        return begin(sharded, num_labels, self._how(part))

    def _labelled(self, fit: KMeansState, updates: int) -> Clustering:
        """All rows by their nearest centroid, exactly or through lists."""
        centroids = torch.from_numpy(fit.centroids).to(self.sharded.device)
        exact = self.method.choice.assignment == "exact"
        work = exactly(self.sharded, centroids) if exact else through_lists(centroids, self.method.probes)
        rows, told = assign_rows(self.sharded, work, self.sharded.blocks())
        fit = replace(fit, inertia=(*fit.inertia, rows.inertia(self.sharded)))
        return self._told(fit, updates, rows, told.tolist())

    def _told(self, fit: KMeansState, updates: int, rows: RowLabels, told: list[int]) -> Clustering:
        counts = rows.counts(self.sharded, self.num_labels)
        result = KMeansResult(
            centroids=fit.centroids,
            labels=rows.by_shard(self.sharded),
            counts=counts.numpy(),
            inertia=[i * SQUARE_UNIT for i in fit.inertia],
            empty_repaired=fit.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=told[0] / self.sharded.num_good,
            searched_share=told[1] / (self.sharded.num_good * self.num_labels),
        )
        found = Clustering(result=result, updates=updates, sampled_rows=self.sharded.num_good)
        if self.method.choice.assignment == "approximate":
            centroids = torch.from_numpy(fit.centroids).to(self.sharded.device)
            found = replace(found, agreement=agreement(self.sharded, rows, centroids, self.seed))
        return found if self.method.balance is None else self._balanced(found, rows)

    def _balanced(self, found: Clustering, rows: RowLabels) -> Clustering:
        assert self.method.balance is not None
        largest = largest_size(self.sharded.num_good, self.num_labels, self.method.balance)
        centroids = torch.from_numpy(found.result.centroids).to(self.sharded.device)
        balanced = balance_labels(self.sharded, rows, centroids, largest)
        counts = rows.counts(self.sharded, self.num_labels)
        *before, unbalanced = found.result.inertia
        result = replace(
            found.result,
            labels=rows.by_shard(self.sharded),
            counts=counts.numpy(),
            inertia=[*before, rows.inertia(self.sharded) * SQUARE_UNIT],
            empty_left=int((counts == 0).sum()),
        )
        return replace(found, result=result, balanced=balanced, unbalanced_inertia=unbalanced)

    def _name(self, part: str) -> str:
        return f"{self.number}/{part}"

    def _keep(self, part: str, progress: KMeansState) -> None:
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


def _own_distances(sharded: ShardedRows, result: KMeansResult) -> RowLabels:
    """The labels that k-means gave, with the exact squared distances that belong to them."""
    labels = torch.from_numpy(np.concatenate(result.labels)) if result.labels else torch.zeros(0, dtype=torch.int32)
    centroids = Centroids.of(torch.from_numpy(result.centroids).to(sharded.device))

    def work(block: tuple[torch.Tensor, torch.Tensor]) -> AssignedRows:
        positions, x = block
        own = labels[positions].long().to(x.device)
        pairs = (torch.arange(len(x), device=x.device), own)
        squares = pair_squares(x, exact_square(x), centroids, pairs)
        return AssignedRows(positions, x, Assignment(own, squares.long()), 0)

    return assign_rows(sharded, work, sharded.blocks())[0]


@dataclass(frozen=True)
class Wanted:
    """One clustering to be made."""

    num_labels: int
    method: Method
    seed: int = 0
    checkpoint: Checkpoint = field(default_factory=dict)  # what `told.on_update` was told last, to go on from there
    told: ClusteringCallbacks = field(default_factory=ClusteringCallbacks)


def shares_passes(method: Method) -> bool:
    """Whether its passes over the rows can serve other clusterings too: those of plain exact k-means."""
    return method.choice.name == "exact" and method.restarts == 1


def cluster_together(sharded: ShardedRows, wanted: Iterable[Wanted]) -> Iterator[tuple[int, Clustering]]:
    """Clusterings that share their passes over the rows, with their place among those wanted, each when it is done.

    Every one is what `cluster` makes of it alone.

    Args:
        wanted: asked for one by one, each when its initialisation is due; `shares_passes` of all.
    """
    under_way: dict[Fit, tuple[int, Restart]] = {}
    for place, one in enumerate(wanted):
        assert shares_passes(one.method)
        run = _first_run(sharded, one)
        under_way[run.begin_exact()] = (place, run)
    for fit in run_fits(list(under_way)):
        place, run = under_way.pop(fit)
        yield place, run.end_exact(fit.result())


def cluster(sharded: ShardedRows, wanted: Wanted) -> Clustering:
    """The clustering of lowest inertia among the restarts, the first of equal ones."""
    first = _first_run(sharded, wanted)
    if wanted.method.restarts == 1:
        return first.cluster()
    kept, told = first.kept, first.told
    seeds = (draw(2**63, *RowDraw.RESTART.key(wanted.seed, number)) for number in range(1, wanted.method.restarts))
    runs = [first, *(replace(first, seed=seed, number=number) for number, seed in enumerate(seeds, start=1))]
    found: dict[int, Clustering] = {}
    for run in runs:
        if run.done not in kept:
            found = {run.number: run.cluster()}
            inertia = round(found[run.number].result.inertia[-1] / SQUARE_UNIT)
            kept[run.done] = KMeansState(np.zeros((0, sharded.dim), np.float32), (inertia,))
            _keep_only(kept, _best(kept, runs[: run.number + 1]))
            told.on_update(kept)
    best = _best(kept, runs)
    if best.number not in found:  # only the passes after its last update are made again
        found[best.number] = best.cluster()
    return replace(found[best.number], restarts=tuple(kept[run.done].inertia[0] * SQUARE_UNIT for run in runs))


def _first_run(sharded: ShardedRows, wanted: Wanted) -> Restart:
    sharded.check_labels(wanted.num_labels)
    return Restart(sharded, wanted.num_labels, wanted.method, wanted.seed, 0, dict(wanted.checkpoint), wanted.told)


def _best(kept: Checkpoint, runs: list[Restart]) -> Restart:
    return min(runs, key=lambda run: (kept[run.done].inertia[0], run.number))


def _keep_only(kept: dict[str, KMeansState], best: Restart) -> None:
    """Forgets the centroids of all other restarts."""
    for key in [k for k in kept if not k.endswith("/done") and not k.startswith(f"{best.number}/")]:
        del kept[key]
