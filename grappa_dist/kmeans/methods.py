"""The methods of clustering, from exact k-means to shortcuts for many rows and labels; restarts; bounded cluster sizes.

All give the same bits on any number of ranks, for any split of the rows and any block size, and a run resumed from a
checkpoint ends with the same result. `choose` settles the method: a function of the numbers of rows, labels and updates
only, since the choice changes the labels and must be the same on any machine. It does not use the dimension, because
artefacts are named before a backbone is built.

Shapes: n rows of all ranks, K labels or centroids, I updates, C = sqrt(K) coarse clusters and as many inverted lists,
p probes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Literal

import numpy as np
import torch

from grappa_dist.config import ClusteringConfig
from grappa_dist.console import format_number
from grappa_dist.data.rng import RowDraw, draw
from grappa_dist.distributed.sharded_rows import GridRows, ShardedRows
from grappa_dist.kmeans.assignments import AssignedRows, RowLabels, assign_rows, exact_search
from grappa_dist.kmeans.balanced import Balanced, balance_labels, largest_size
from grappa_dist.kmeans.hierarchical import fit_subclusters
from grappa_dist.kmeans.ivf import Agreement, agreement, probed_search, refine
from grappa_dist.kmeans.lloyd import (
    SQUARE_UNIT,
    Fit,
    KMeansResult,
    KMeansState,
    KMeansTask,
    ProgressCallbacks,
    run_fit,
    run_fits,
    start_fit,
    start_sliced_fit,
)
from grappa_dist.kmeans.sampling import sample_rows
from grappa_dist.kmeans.seeding import Init
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import exact_square
from grappa_dist.search.rerank import Assignment, pair_squares

MethodName = Literal["exact", "sampled", "hierarchical", "approximate"]
AssignmentKind = Literal["exact", "approximate"]
FLAT: tuple[MethodName, ...] = ("exact", "sampled")
"""Methods that fit all centroids at once, not on two levels."""

PAIRS = 5 * 10**13
"""Pairs of row and centroid that `auto` spends on one part: about a day and a half of one core (docs/scale.md)."""

CENTROID_BYTES = 56
"""Bytes for each number of the centroids that a rank of k-means holds (docs/scale.md)."""

CENTROID_SHARE = 0.5
"""`auto` shards centroids that would take more than this share of the memory that a rank has."""

PLUS_PLUS_LABELS, PLUS_PLUS_ROWS = 2**17, 8
"""`auto` draws at most PLUS_PLUS_LABELS centroids by k-means++, which reads the rows more often the more there are; and
any number of them where there are fewer than PLUS_PLUS_ROWS rows per centroid, since most rows would be candidates of
k-means||."""


@dataclass(frozen=True)
class Choice:
    """How one K is clustered: the settings that were "auto", resolved, and the reason."""

    name: MethodName
    assignment: AssignmentKind  # of all rows, with the final centroids
    reason: str
    init: Init = "k-means++"  # of the flat fit: of all centroids, or of the coarse ones where there are two levels


def choose(config: ClusteringConfig, num_labels: int, num_rows: int) -> Choice:
    """Resolves what is "auto": the method of lowest inertia whose fit is affordable, and likewise the assignment."""
    name, reason = _method(config, num_labels, num_rows)
    assignment, assignment_reason = _assignment(name, config, num_labels, num_rows)
    init = _init(config, num_labels if name in FLAT else isqrt(num_labels), num_rows)
    init_reason = "; first centroids by k-means||" if init == "k-means||" else ""
    return Choice(name, assignment, reason + assignment_reason + init_reason, init)


def may_shard_centroids(config: ClusteringConfig, choice: Choice) -> bool:
    """Whether ranks can hold a slice of the centroids each: in plain exact k-means."""
    return choice.name == "exact" and config.restarts == 1 and config.balance is None


@dataclass(frozen=True)
class RankMemory:
    """The ranks of a job, and the bytes that each has: the least part of a node's memory; 0: not known."""

    ranks: int
    rank_bytes: int


def centroid_shards(asked: int | Literal["auto"], num_labels: int, dim: int, where: RankMemory) -> int:
    """How many slices the centroids have: a divisor of the number of ranks, which changes no bit of a result.

    The fewest, but not fewer than asked for; by default the fewest with which a slice does not take more than
    CENTROID_SHARE of the memory. Where no number does, there are as many slices as ranks.
    """
    if asked == "auto" and not where.rank_bytes:
        return 1
    whole, allowed = CENTROID_BYTES * num_labels * dim, CENTROID_SHARE * where.rank_bytes
    divisors = [n for n in range(1, where.ranks + 1) if where.ranks % n == 0]
    return next((n for n in divisors if (n >= asked if asked != "auto" else whole <= allowed * n)), where.ranks)


def fit_pairs(name: MethodName, config: ClusteringConfig, num_labels: int, num_rows: int) -> int:
    """Pairs of row and centroid that a fit compares, without the savings by bounds.

    exact: n K (I + 1). hierarchical: n C (I + 1) for either level. approximate: the same, then per update n C coarse
    and n p K / C other centroids. sampled: m K (I + 1) for m sampled rows.
    """
    passes, level = config.iterations + 1, num_rows * isqrt(num_labels)
    two_levels = 2 * level * passes
    return {
        "exact": num_rows * num_labels * passes,
        "sampled": min(num_rows, num_labels * config.sample_rows_per_cluster) * num_labels * passes,
        "hierarchical": two_levels,
        "approximate": two_levels + level * (1 + config.probes) * passes,
    }[name]


def _count(pairs: float) -> str:
    return format_number(pairs, 2)


def _method(config: ClusteringConfig, num_labels: int, num_rows: int) -> tuple[MethodName, str]:
    if config.method != "auto":
        return config.method, f"clustering.method is {config.method}"
    names: tuple[MethodName, ...] = ("exact", "approximate", "hierarchical")
    exact, lists, levels = (fit_pairs(name, config, num_labels, num_rows) for name in names)
    pairs, limit = f"{_count(exact)} pairs of row and centroid", _count(PAIRS)
    if exact <= PAIRS:
        return "exact", f"exact k-means takes {pairs}, at most {limit} are spent"
    too_many = f"exact k-means would take {pairs}, more than {limit}"
    if lists <= PAIRS:
        return "approximate", f"{too_many}; two levels and updates through lists take {_count(lists)}"
    return "hierarchical", f"{too_many}, and updates through lists {_count(lists)}; two levels take {_count(levels)}"


def _assignment(
    name: MethodName, config: ClusteringConfig, num_labels: int, num_rows: int
) -> tuple[AssignmentKind, str]:
    if name == "exact":
        return "exact", ""
    pairs = num_rows * num_labels
    if config.assignment != "auto":
        return config.assignment, f"; clustering.assignment is {config.assignment}"
    if pairs <= PAIRS:
        return "exact", f"; exact labels at the end take {_count(pairs)} pairs"
    return "approximate", f"; exact labels at the end would take {_count(pairs)} pairs"


def _init(config: ClusteringConfig, num_centroids: int, num_rows: int) -> Init:
    if config.init != "auto":
        return config.init
    many = num_centroids > PLUS_PLUS_LABELS and num_rows >= PLUS_PLUS_ROWS * num_centroids
    return "k-means||" if many else "k-means++"


Checkpoint = Mapping[str, KMeansState]
"""The states of the parts of a method, by name: a run continues from them with the same result."""


@dataclass(frozen=True)
class ClusteringCallbacks(ProgressCallbacks):
    """Progress as k-means reports it, and the checkpoint after each update and each round of an initialisation."""

    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None


@dataclass(frozen=True)
class ClusteringTask:
    """One clustering: settings, what was "auto" in them, where it starts and where it reports."""

    num_labels: int
    config: ClusteringConfig
    choice: Choice
    seed: int = 0
    checkpoint: Checkpoint = field(default_factory=dict)  # the last one, to continue from
    grid: GridRows | None = None  # the rows where the centroids are sharded: `may_shard_centroids`
    callbacks: ClusteringCallbacks = ClusteringCallbacks()


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Labels and centroids, and how exact they are."""

    result: KMeansResult
    updates: int  # of the centroids (K, D), in the last part of the method
    sampled_rows: int  # rows to which the centroids were fitted
    agreement: Agreement | None = None  # with the exact assignment, where it was not exact
    unbalanced_inertia: float | None = None  # before rows were moved for the bound on sizes
    balanced: Balanced | None = None
    restarts: tuple[float, ...] = ()  # inertia of each, where there were several


def shares_passes(config: ClusteringConfig, choice: Choice) -> bool:
    """Whether its passes over the rows can serve other clusterings too: those of plain exact k-means, not sharded."""
    return choice.name == "exact" and config.restarts == 1


def cluster_together(sharded: ShardedRows, tasks: Iterable[ClusteringTask]) -> Iterator[tuple[int, Clustering]]:
    """Clusterings that share their passes over the rows, each when it ends, with its place among the tasks.

    Each result is that of `cluster`.

    Args:
        tasks: taken one by one, each when its initialisation is due; `shares_passes` of all.
    """
    running: dict[Fit, tuple[int, Restart]] = {}
    for place, task in enumerate(tasks):
        assert shares_passes(task.config, task.choice)
        run = _first_run(sharded, task)
        running[run.start_exact()] = (place, run)
    for fit in run_fits(list(running)):
        place, run = running.pop(fit)
        yield place, run.finish_exact(fit.result())


def cluster(sharded: ShardedRows, task: ClusteringTask) -> Clustering:
    """The clustering of lowest inertia among the restarts, the first of equal ones."""
    first, restarts = _first_run(sharded, task), task.config.restarts
    if restarts == 1:
        return first.cluster()
    states = first.states
    seeds = (draw(2**63, *RowDraw.RESTART.key(task.seed, number)) for number in range(1, restarts))
    runs = [first, *(replace(first, seed=seed, number=number) for number, seed in enumerate(seeds, start=1))]
    found: dict[int, Clustering] = {}
    for run in runs:
        if run.done not in states:
            found = {run.number: run.cluster()}
            inertia = round(found[run.number].result.inertia[-1] / SQUARE_UNIT)
            states[run.done] = KMeansState(np.zeros((0, sharded.dim), np.float32), (inertia,))
            _keep_only(states, _best(states, runs[: run.number + 1]))
            task.callbacks.on_checkpoint(states)
    best = _best(states, runs)
    if best.number not in found:  # only the passes after its last update are made again
        found[best.number] = best.cluster()
    return replace(found[best.number], restarts=tuple(states[run.done].inertia[0] * SQUARE_UNIT for run in runs))


def _first_run(sharded: ShardedRows, task: ClusteringTask) -> Restart:
    sharded.check_labels(task.num_labels)
    states = dict(task.checkpoint)
    if task.grid is None:  # with a grid each rank copies its slice
        # They are mapped, and on a network file system a map dies with its file, which later saves remove.
        states = {part: replace(state, centroids=state.centroids.copy()) for part, state in states.items()}
    return Restart(sharded, task, task.seed, 0, states)


def _best(states: Checkpoint, runs: list[Restart]) -> Restart:
    return min(runs, key=lambda run: (states[run.done].inertia[0], run.number))


def _keep_only(states: dict[str, KMeansState], best: Restart) -> None:
    """Drops the centroids of all other restarts."""
    for key in [k for k in states if not k.endswith("/done") and not k.startswith(f"{best.number}/")]:
        del states[key]


@dataclass(frozen=True)
class Restart:
    """One run of a method, of which there may be several with other seeds."""

    sharded: ShardedRows
    task: ClusteringTask
    seed: int
    number: int
    states: dict[str, KMeansState]  # the checkpoint of all restarts, changed in place

    @property
    def done(self) -> str:
        return f"{self.number}/done"

    def cluster(self) -> Clustering:
        methods = {
            "exact": self._exact,
            "sampled": self._sampled,
            "hierarchical": self._hierarchical,
            "approximate": self._approximate,
        }
        return methods[self.task.choice.name]()

    def start_exact(self) -> Fit:
        """Plain k-means before its first pass."""
        if self.task.grid is not None:
            return start_sliced_fit(self.task.grid, self.task.num_labels, self.part("fit"))
        return start_fit(self.sharded, self.task.num_labels, self.part("fit"))

    def finish_exact(self, result: KMeansResult) -> Clustering:
        """The clustering from the result of plain k-means."""
        found = Clustering(result=result, updates=len(result.inertia) - 1, sampled_rows=self.sharded.num_good)
        if self.task.config.balance is None:
            return found
        return self._balanced(found, _own_distances(self.sharded, result))

    def _exact(self) -> Clustering:
        return self.finish_exact(run_fit(self.start_exact()))

    def _sampled(self) -> Clustering:
        num_labels = self.task.num_labels
        num = num_labels * self.task.config.sample_rows_per_cluster
        sample = sample_rows(self.sharded, num, *RowDraw.FIT_SAMPLE.key(self.seed, num_labels))
        fit = run_fit(start_fit(sample, num_labels, self.part("fit")))
        found = self._label_rows(KMeansState(fit.centroids, (), fit.empty_repaired), len(fit.inertia) - 1)
        return replace(found, sampled_rows=sample.num_good)

    def _hierarchical(self) -> Clustering:
        fit = self._two_levels()
        return self._label_rows(fit, len(fit.inertia) - 1)

    def _approximate(self) -> Clustering:
        start = self.states.get(self._key("refined"))
        if start is None:
            start = KMeansState(self._two_levels().centroids, ())
            for part in ("coarse", "fine"):
                self.states.pop(self._key(part))
            self._save("refined", start)
        fit, passes = refine(self.sharded, start, self.part("refined"))
        if self.task.choice.assignment == "exact":
            return self._label_rows(fit, len(fit.inertia) - 1)
        counts = self.sharded.total(torch.tensor([passes.undecided, passes.searched]))
        return self._clustering(fit, len(fit.inertia) - 1, passes.rows, counts.tolist())

    def _two_levels(self) -> KMeansState:
        """Centroids (K, D) by coarse clusters and their sub-clusters."""
        coarse, fine = self.states.get(self._key("coarse")), self.states.get(self._key("fine"))
        if coarse is None or fine is None:  # where there is a fine state, the coarse one is final
            num = isqrt(self.task.num_labels)
            coarse = KMeansState(run_fit(start_fit(self.sharded, num, self.part("coarse"))).centroids, ())
        return fit_subclusters(self.sharded, coarse.centroids, self.task.num_labels, self.part("fine"))

    def _label_rows(self, fit: KMeansState, updates: int) -> Clustering:
        """All rows by their nearest centroid, exactly or through inverted lists."""
        centroids = torch.from_numpy(fit.centroids).to(self.sharded.device)
        exact = self.task.choice.assignment == "exact"
        search = exact_search(self.sharded, centroids) if exact else probed_search(centroids, self.task.config.probes)
        rows, counts = assign_rows(self.sharded, search, self.sharded.blocks())
        fit = replace(fit, inertia=(*fit.inertia, rows.inertia(self.sharded)))
        return self._clustering(fit, updates, rows, counts.tolist())

    def _clustering(self, fit: KMeansState, updates: int, rows: RowLabels, undecided_searched: list[int]) -> Clustering:
        num_labels, num_good = self.task.num_labels, self.sharded.num_good
        counts = rows.counts(self.sharded, num_labels)
        result = KMeansResult(
            centroids=fit.centroids,
            labels=rows.by_shard(self.sharded),
            counts=counts.numpy(),
            inertia=[i * SQUARE_UNIT for i in fit.inertia],
            empty_repaired=fit.repaired,
            empty_left=int((counts == 0).sum()),
            exact_share=undecided_searched[0] / num_good,
            searched_share=undecided_searched[1] / (num_good * num_labels),
        )
        found = Clustering(result=result, updates=updates, sampled_rows=num_good)
        if self.task.choice.assignment == "approximate":
            centroids = torch.from_numpy(fit.centroids).to(self.sharded.device)
            found = replace(found, agreement=agreement(self.sharded, rows, centroids, self.seed))
        return found if self.task.config.balance is None else self._balanced(found, rows)

    def _balanced(self, found: Clustering, rows: RowLabels) -> Clustering:
        assert self.task.config.balance is not None
        largest = largest_size(self.sharded.num_good, self.task.num_labels, self.task.config.balance)
        centroids = torch.from_numpy(found.result.centroids).to(self.sharded.device)
        balanced = balance_labels(self.sharded, rows, centroids, largest)
        counts = rows.counts(self.sharded, self.task.num_labels)
        *before, unbalanced = found.result.inertia
        result = replace(
            found.result,
            labels=rows.by_shard(self.sharded),
            counts=counts.numpy(),
            inertia=[*before, rows.inertia(self.sharded) * SQUARE_UNIT],
            empty_left=int((counts == 0).sum()),
        )
        return replace(found, result=result, balanced=balanced, unbalanced_inertia=unbalanced)

    def part(self, name: str) -> KMeansTask:
        """The k-means of one part of the method: it resumes from the part's state and saves it after every update."""
        restart = f"restart {self.number + 1}, " if self.task.config.restarts > 1 else ""
        return KMeansTask(
            self.task.config,
            seed=self.seed,
            init=self.task.choice.init,
            resume=self.states.get(self._key(name)),
            part=restart + ("" if name == "fit" else f"{name} "),
            callbacks=self.task.callbacks,
            on_update=lambda state: self._save(name, state),
        )

    def _key(self, part: str) -> str:
        return f"{self.number}/{part}"

    def _save(self, part: str, state: KMeansState) -> None:
        self.states[self._key(part)] = state
        self.task.callbacks.on_checkpoint(self.states)


def _own_distances(sharded: ShardedRows, result: KMeansResult) -> RowLabels:
    """The labels of a k-means, with the exact squared distances that belong to them."""
    labels = torch.from_numpy(np.concatenate(result.labels)) if result.labels else torch.zeros(0, dtype=torch.int32)
    centroids = Centroids.of(torch.from_numpy(result.centroids).to(sharded.device))

    def work(block: tuple[torch.Tensor, torch.Tensor]) -> AssignedRows:
        positions, x = block
        own = labels[positions].long().to(x.device)
        pairs = (torch.arange(len(x), device=x.device), own)
        squares = pair_squares(x, exact_square(x), centroids, pairs)
        return AssignedRows(positions, x, Assignment(own, squares.long()), 0)

    return assign_rows(sharded, work, sharded.blocks())[0]
