"""Figures that need no labels against R-Precision: do they rank models as labels would?

Of finished runs on the same test images (`bench.py gain` makes them), every model has a figure and an R-Precision on
each task. A figure is of use where its rank correlation with R-Precision over models is high on every task.

Shapes: n images of a task, D channels, k neighbours, C clusters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Log, aligned, aligned_header, check_least, machine
from grappa_dist.checksums import load_json
from grappa_dist.metrics import retrieval_scores
from grappa_dist.retrieval.map_images import flow_of
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import feature_rows
from grappa_dist.stages.evaluate import INSIGHT_FILE
from grappa_dist.stages.gallery_weights import effective_rank, transitivity
from grappa_dist.stages.ground_truth import load_ground_truth
from grappa_dist.variants import BACKBONE

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]
ROWS_OF_A_CLUSTER = 20  # on average
AVERAGE, AS_TRAINED, LABELS = "average", "(the average, always)", "(the best by labels)"
_SIZES, _STARTS = (10, 20, 40), 3  # rows of a cluster, and runs of k-means, where a mean is taken
_SLOPE = slice(2, 60)  # eigenvalues whose decay is fitted


@dataclass(frozen=True)
class Features:
    """Unit rows of a task's images by one model, and what is computed of them once."""

    z: Rows  # (n, D)
    k: int

    @cached_property
    def cosines(self) -> Rows:
        """(n, n), -1 at the image itself."""
        found = self.z @ self.z.T
        np.fill_diagonal(found, -1)
        return found

    @cached_property
    def near(self) -> Ids:
        """The k nearest others, nearest first, (n, k)."""
        return np.argsort(-self.cosines, axis=1, kind="stable")[:, : self.k].astype(np.int64)

    @cached_property
    def relation(self) -> NDArray[np.bool_]:
        """Whether j is one of the k nearest of i, (n, n)."""
        found = np.zeros((len(self.z), len(self.z)), np.bool_)
        np.put_along_axis(found, self.near, True, axis=1)
        return found

    def clusters(self, rows_each: int = ROWS_OF_A_CLUSTER, seed: int = 0) -> Ids:
        """k-means of the rows, (n,)."""
        count = min(max(2, len(self.z) // rows_each), len(self.z))
        found = faiss.Kmeans(self.z.shape[1], count, niter=20, seed=seed + 1, min_points_per_centroid=1)
        found.train(self.z)
        return np.asarray(found.index.search(self.z, 1)[1][:, 0], np.int64)


@dataclass(frozen=True)
class Gallery:
    """A task of a run: its images by every model."""

    models: Mapping[str, Features]
    labels: Ids  # (n,)
    views: Mapping[str, float] = field(default_factory=dict)  # by model, the report's figure of all tasks together
    partition: Ids = field(init=False)  # of the backbone's rows
    ensemble: Ids = field(init=False)  # of all models' rows side by side

    def __post_init__(self) -> None:
        side_by_side = np.concatenate([features.z for features in self.models.values()], axis=1)
        k = next(iter(self.models.values())).k
        object.__setattr__(self, "partition", self.models[BACKBONE].clusters())
        object.__setattr__(self, "ensemble", Features(side_by_side, k).clusters())

    def r_precision(self, model: str) -> float:
        return self.precision_of(model, self.labels)

    def precision_of(self, model: str, labels: Ids) -> float:
        """R-Precision as if these were the classes."""
        found = retrieval_scores(torch.from_numpy(self.models[model].z), torch.from_numpy(labels))
        return found["r_precision"]


def reciprocity(features: Features) -> float:
    """The share of neighbours whose neighbour the image is as well."""
    return float((features.relation & features.relation.T).sum() / features.relation.sum())


def evenness(features: Features) -> float:
    """The skewness of how often an image is a neighbour (Radovanovic et al. 2010, hubness), negated."""
    counts = features.relation.sum(0).astype(float)
    spread = counts.std()
    return -float((((counts - counts.mean()) / spread) ** 3).mean()) if spread else 0.0


def contrast(features: Features) -> float:
    """How many standard deviations the k nearest are above the mean of all cosines."""
    others = features.cosines[~np.eye(len(features.z), dtype=np.bool_)]
    nearest = np.take_along_axis(features.cosines, features.near, axis=1)
    return float((nearest.mean() - others.mean()) / others.std())


def flatness(features: Features) -> float:
    """1 - |a - 1| for eigenvalues of the covariance that fall as i^-a (Agrawal et al. 2022, alpha-ReQ)."""
    centred = features.z - features.z.mean(0)
    values = np.linalg.eigvalsh(centred.T.astype(float) @ centred)[::-1].clip(1e-12)[_SLOPE]
    places = np.arange(_SLOPE.start, _SLOPE.start + len(values)) + 1
    slope = np.polyfit(np.log(places), np.log(values), 1)[0]
    return 1 - abs(-float(slope) - 1)


def low_dimension(features: Features) -> float:
    """The intrinsic dimension by the two nearest neighbours (Facco et al. 2017), negated."""
    first, second = np.sort(features.cosines, axis=1)[:, [-1, -2]].T
    ratio = np.sqrt((1 - second).clip(1e-6) / (1 - first).clip(1e-6))
    return -len(ratio) / float(np.log(ratio.clip(1 + 1e-9)).sum())


def learnability(features: Features) -> float:
    """How often an image and its nearest are of one k-means cluster (Lu et al. 2022, cluster learnability).

    The mean over clusters of different sizes and starts, since one partition of few images is a matter of chance.
    """
    partitions = [features.clusters(rows_each, seed) for rows_each in _SIZES for seed in range(_STARTS)]
    return statistics.fmean(float((of[features.near[:, 0]] == of).mean()) for of in partitions)


def stability(features: Features) -> float:
    """The adjusted Rand index of k-means from two starts (Ben-Hur et al. 2002 use samples), the mean as above."""
    from sklearn.metrics import adjusted_rand_score

    pairs = [[features.clusters(rows_each, seed) for seed in range(2)] for rows_each in _SIZES]
    return statistics.fmean(float(adjusted_rand_score(*pair)) for pair in pairs)


def shared(one: Features, other: Features) -> float:
    """The share of neighbours that two models have in common."""
    return float((one.relation & other.relation).sum() / one.relation.sum())


def _others(gallery: Gallery, model: str) -> float:
    others = [features for name, features in gallery.models.items() if name != model]
    return statistics.fmean(shared(gallery.models[model], other) for other in others)


FIGURES: dict[str, Callable[[Gallery, str], float]] = {
    "transitivity": lambda g, m: float(transitivity(torch.from_numpy(g.models[m].z)).mean()),
    "reciprocity": lambda g, m: reciprocity(g.models[m]),
    "even in-degrees": lambda g, m: evenness(g.models[m]),
    "contrast of neighbours": lambda g, m: contrast(g.models[m]),
    "effective rank (RankMe)": lambda g, m: effective_rank(torch.from_numpy(g.models[m].z)),
    "spectrum (alpha-ReQ)": lambda g, m: flatness(g.models[m]),
    "low intrinsic dimension": lambda g, m: low_dimension(g.models[m]),
    "cluster learnability": lambda g, m: learnability(g.models[m]),
    "stability of clusters": lambda g, m: stability(g.models[m]),
    "neighbours of the backbone": lambda g, m: shared(g.models[m], g.models[BACKBONE]),
    "neighbours of the other models": _others,
    "R-Precision on the backbone's clusters": lambda g, m: g.precision_of(m, g.partition),
    "R-Precision on all models' clusters": lambda g, m: g.precision_of(m, g.ensemble),
    "views find their source": lambda g, m: g.views.get(m, 0.0),
}


@dataclass(frozen=True)
class CriteriaSettings:
    """Options of `bench.py criteria`."""

    runs: tuple[str, ...]
    k: int
    chosen_on: tuple[str, ...]

    def check(self) -> None:
        check_least(self, k=1)
        if len(self.runs) < 2:
            raise ValueError(f"RUN: expected two runs or more, got {len(self.runs)}")


@dataclass(frozen=True)
class Point:
    """A model of a run on a task."""

    run: str
    task: str
    model: str
    r_precision: float
    figures: Mapping[str, float]


def measure_criteria(settings: CriteriaSettings, log: Log) -> list[Point]:
    """Every model of every run on every task.

    Raises:
        ValueError: a path is no run, or the runs were not tested on the same tasks.
    """
    settings.check()
    torch.set_num_threads(1)
    points = list[Point]()
    for number, root in enumerate(settings.runs, 1):
        log(f"run {number} of {len(settings.runs)}: {root}")
        for task, gallery in galleries(Path(root), settings.k).items():
            for model in gallery.models:
                figures = {name: figure(gallery, model) for name, figure in FIGURES.items()}
                points.append(Point(root, task, model, gallery.r_precision(model), figures))
    tasks = {run: {p.task for p in points if p.run == run} for run in settings.runs}
    if len({frozenset(of_run) for of_run in tasks.values()}) > 1:
        raise ValueError(f"RUN: the runs were tested on different tasks: {tasks}")
    return points


def galleries(root: Path, k: int) -> dict[str, Gallery]:
    """By task the labelled test images of a run, by each of its models."""
    _, flow = flow_of(root)
    known = load_ground_truth(flow.ground_truth)
    good = np.setdiff1d(np.flatnonzero(known.labels >= 0), bad_rows(flow.test, flow.test_features[BACKBONE]))
    found = {m: feature_rows(flow.test, features) for m, features in flow.test_features.items()}
    views = {m: load_json(a.path / INSIGHT_FILE)["view_finds_source"] for m, a in flow.insights.items() if a.complete}
    by_task = dict[str, Gallery]()
    for number, task in enumerate(known.task_names):
        rows = good[known.tasks[good] == number]
        models = {m: Features(features.take_unit(rows), k) for m, features in found.items()}
        by_task[task] = Gallery(models, known.labels[rows].astype(np.int64), views)
    return by_task


def correlations(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of each figure with R-Precision over all models of all runs, by task."""
    from scipy.stats import spearmanr

    found = dict[str, dict[str, float]]()
    for name in FIGURES:
        found[name] = {}
        for task in sorted({p.task for p in points}):
            some = [p for p in points if p.task == task]
            values = spearmanr([p.figures[name] for p in some], [p.r_precision for p in some])
            found[name][task] = float(values.statistic)
    return found


def right_signs(points: Sequence[Point]) -> dict[str, float]:
    """Of models that differ from their run's backbone by a point or more, how often a figure has the right sign."""
    base = {(p.run, p.task): p for p in points if p.model == BACKBONE}
    right: dict[str, list[bool]] = {name: [] for name in FIGURES}
    for p in points:
        of_backbone = base[p.run, p.task]
        gain = p.r_precision - of_backbone.r_precision
        if abs(gain) >= 0.01:
            for name in FIGURES:
                right[name].append((p.figures[name] > of_backbone.figures[name]) == (gain > 0))
    return {name: statistics.fmean(found) if found else float("nan") for name, found in right.items()}


def gains_of_picks(points: Sequence[Point]) -> dict[str, list[float]]:
    """In points above the backbone, what is gained where the model of highest figure is taken, by run and task."""
    found: dict[str, list[float]] = {name: [] for name in (*FIGURES, AS_TRAINED, LABELS)}
    for key in sorted({(p.run, p.task) for p in points}):
        some = [p for p in points if (p.run, p.task) == key]
        base = next(p.r_precision for p in some if p.model == BACKBONE)
        for name in FIGURES:
            found[name].append(100 * (max(some, key=lambda p: p.figures[name]).r_precision - base))
        found[LABELS].append(100 * (max(p.r_precision for p in some) - base))
        found[AS_TRAINED] += [100 * (p.r_precision - base) for p in some if p.model == AVERAGE]
    return found


def as_text(header: Mapping[str, str], points: Sequence[Point], chosen_on: Sequence[str]) -> str:
    tasks = sorted({p.task for p in points})
    chosen = [task for task in tasks if task in chosen_on] or tasks
    others = [task for task in tasks if task not in chosen] or tasks
    found, signs, picks = correlations(points), right_signs(points), gains_of_picks(points)
    means = [f"mean of {', '.join(part)}" for part in (chosen, others)]
    lines = [["figure", *tasks, *means, "right signs", "its picks gain", "least"]]
    for name, by_task in sorted(found.items(), key=lambda item: -statistics.fmean(item[1][t] for t in chosen)):
        numbers = [by_task[t] for t in tasks]
        numbers += [statistics.fmean(by_task[t] for t in part) for part in (chosen, others)]
        lines.append([name, *(f"{number:+.2f}" for number in numbers), f"{signs[name]:.0%}", *_gain(picks[name])])
    for name in (AS_TRAINED, LABELS):
        lines.append([name, *["-"] * (len(lines[0]) - 3), *_gain(picks[name])])
    about = {"models": f"{len(points) // len(tasks)} of {len({p.run for p in points})} runs"}
    return "\n\n".join([aligned_header({**header, **about}), aligned(lines)])


def _gain(found: Sequence[float]) -> list[str]:
    return [f"{statistics.fmean(found):+.2f}", f"{min(found):+.2f}"] if found else ["-", "-"]


SHORT = "figures without labels against R-Precision, over the models of many runs"
DESCRIPTION = __doc__
EXAMPLE = """example:
  python launch/bench.py criteria runs/gain/cells/*_h64 --chosen-on cub100 omniglot_small"""


def arguments(add: Callable[..., Any]) -> None:
    add("runs", nargs="+", metavar="RUN", help="finished runs with the same labelled test images")
    add("--k", type=int, default=10, metavar="N", help="neighbours; default: %(default)s")
    add(
        "--chosen-on",
        nargs="*",
        default=[],
        metavar="TASK",
        help="tasks that figures are sorted by; the others only report",
    )


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = CriteriaSettings(tuple(options["runs"]), options["k"], tuple(options["chosen_on"]))
    points = measure_criteria(settings, log)
    header = machine(1)
    return as_text(header, points, settings.chosen_on), {"machine": header, "points": [vars(p) for p in points]}
