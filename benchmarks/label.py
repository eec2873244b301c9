"""How many answers tell two models apart, simulated with the labels of a finished run's test images.

The models are the backbone of the run and its last model, whose features are moved to, or from, the means of their
classes until precision at k differs by what is asked: a planted difference, on features of a run. Three ways to spend
answers:

- couples: what `grappa-dist evaluate --label` asks (retrieval/answers.py), the fifth about agreed pairs counted;
- uniform: pairs of a query and an image that either model finds, drawn evenly, with the same kind of interval;
- labels: images drawn evenly and given their class, both models scored among these images alone, and the interval
  over queries. An answer is then a class, which takes a person longer than "same or not".

A difference is shown where the 95 % interval lies above zero. Shapes: n images, k neighbours, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Log, aligned, aligned_header, check_least, machine
from grappa_dist.metrics import retrieval_scores
from grappa_dist.retrieval.answers import Ids, Questions, matched_interval, questions_of
from grappa_dist.retrieval.labelling import neighbours_of
from grappa_dist.retrieval.map_images import flow_of
from grappa_dist.retrieval.nearest import Rows
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import feature_rows
from grappa_dist.stages.ground_truth import load_ground_truth

COUPLES, UNIFORM, LABELS = "couples", "uniform", "labels"
POWER = 0.8  # share of the trials in which the difference is shown
_STEPS = 8  # of the search for a planted difference
_POINTS = 10  # numbers of labelled images that are tried


@dataclass(frozen=True)
class LabelSettings:
    """Options of `bench.py label`."""

    run: str
    k: int
    points: tuple[float, ...]  # points
    trials: int
    seed: int

    def check(self) -> None:
        check_least(self, k=1, trials=1, seed=0)


@dataclass(frozen=True)
class Needed:
    """How many answers show one planted difference, by how they are spent; None: not even all that there are."""

    gap: float  # points, as planted
    r_precision_gap: float  # points
    differing: float  # share of neighbours
    spread: float  # standard deviation of y - y'
    images: int
    answers: dict[str, int | None]


@dataclass(frozen=True)
class LabelFindings:
    models: dict[str, dict[str, float]]  # R-Precision and precision at k of the models of the run
    needed: tuple[Needed, ...]


def measure_label(settings: LabelSettings, log: Log) -> LabelFindings:
    settings.check()
    torch.set_num_threads(1)
    features, labels = _run_features(Path(settings.run))
    models = {}
    for name, z in features.items():
        scores = {"r_precision": _r_precision(z, labels), "precision": _precision(z, labels, settings.k)}
        models[name] = scores
        log(f"{name}: {scores}")
    backbone, adapted = features["backbone"], list(features.values())[-1]
    needed = []
    for gap in settings.points:
        planted = plant(backbone, adapted, labels, settings.k, gap / 100)
        needed.append(_needed(backbone, planted, labels, settings))
        log(f"{gap} points: {needed[-1]}")
    return LabelFindings(models, tuple(needed))


def _run_features(root: Path) -> tuple[dict[str, Rows], Ids]:
    """Unit rows (n, D) of the labelled test images by every model of a run, and the class of each, over all tasks."""
    _, flow = flow_of(root)
    known = load_ground_truth(flow.ground_truth)
    rows = np.setdiff1d(np.flatnonzero(known.labels >= 0), bad_rows(flow.test, flow.test_features["backbone"]))
    of_class = known.tasks[rows].astype(np.int64) * (int(known.labels.max()) + 1) + known.labels[rows]
    return {m: feature_rows(flow.test, found).take_unit(rows) for m, found in flow.test_features.items()}, np.unique(
        of_class, return_inverse=True
    )[1]


def _r_precision(z: Rows, labels: Ids) -> float:
    return retrieval_scores(torch.from_numpy(z), torch.from_numpy(labels))["r_precision"]


def _near(z: Rows, k: int) -> Ids:
    return neighbours_of(z, np.arange(len(z)), k)


def _precision(z: Rows, labels: Ids, k: int) -> float:
    return float((labels[_near(z, k)] == labels[:, None]).mean())


def plant(backbone: Rows, adapted: Rows, labels: Ids, k: int, gap: float) -> Rows:
    """The adapted rows, moved to or from the means of their classes: precision at k is `gap` above the backbone's."""
    sums = np.zeros((int(labels.max()) + 1, adapted.shape[1]), np.float32)
    np.add.at(sums, labels, adapted)
    means = sums[labels] / np.bincount(labels)[labels, None]
    wanted = _precision(backbone, labels, k) + gap

    def moved(share: float) -> Rows:
        rows = adapted + np.float32(share) * means
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    low, high = -0.5, 0.5
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _precision(moved(middle), labels, k) < wanted else (low, middle)
    return moved(high)


def _needed(backbone: Rows, planted: Rows, labels: Ids, settings: LabelSettings) -> Needed:
    k, rng = settings.k, np.random.default_rng(settings.seed)
    mine, theirs = _near(planted, k), _near(backbone, k)
    questions = questions_of(np.arange(len(labels)), mine, theirs, [str(row) for row in range(len(labels))])
    less = _less(questions, labels)
    return Needed(
        100 * (_precision(planted, labels, k) - _precision(backbone, labels, k)),
        100 * (_r_precision(planted, labels) - _r_precision(backbone, labels)),
        questions.differing,
        float(less.std()),
        len(labels),
        {
            COUPLES: _answers(less, settings.trials, rng, 2.5),
            UNIFORM: _answers(_of_union(questions, labels), settings.trials, rng, 1),
            LABELS: _labelled(backbone, planted, labels, settings),
        },
    )


def _less(questions: Questions, labels: Ids) -> NDArray[np.float64]:
    """y - y' of every couple, (C,)."""
    query, mine, theirs = (labels[column] for column in questions.couples.T)
    return (query == mine).astype(float) - (query == theirs)


def _of_union(questions: Questions, labels: Ids) -> NDArray[np.float64]:
    """What each pair that either model finds adds to the difference: its answer with a sign; 0 where both find it."""
    query, mine, theirs = (labels[column] for column in questions.couples.T)
    return np.concatenate([query == mine, -(query == theirs).astype(float), np.zeros(len(questions.agreed))])


def _answers(values: NDArray[np.float64], trials: int, rng: np.random.Generator, each: float) -> int | None:
    """The answers from which on so many trials tell that the mean of all values is above zero, `each` for a value."""
    shown = np.zeros(len(values), np.int64)
    count = np.arange(1, len(values) + 1)
    for _ in range(trials):
        drawn = rng.permutation(values)
        low, _ = matched_interval(count, drawn.cumsum(), (drawn**2).cumsum(), len(values))
        shown += low > 0
    return _first(shown / trials >= POWER, count * each)


def _first(enough: NDArray[np.bool_], answers: NDArray[Any]) -> int | None:
    """The number after the last one that was not enough."""
    short = np.flatnonzero(~enough)
    start = 0 if not len(short) else int(short[-1]) + 1
    return None if start == len(answers) else math.ceil(answers[start])


def _labelled(backbone: Rows, planted: Rows, labels: Ids, settings: LabelSettings) -> int | None:
    """Labelled images from which on precision at k among them tells that the planted model is better."""
    rng, n = np.random.default_rng(settings.seed + 1), len(labels)
    sizes = np.unique(np.linspace(settings.k + 2, n, _POINTS).astype(int))
    shown = np.zeros(len(sizes))
    for place, size in enumerate(sizes):
        for _ in range(trials := max(1, settings.trials // 10)):
            rows = rng.permutation(n)[:size]
            less = _right(planted[rows], labels[rows], settings.k) - _right(backbone[rows], labels[rows], settings.k)
            shown[place] += less.mean() > 1.96 * less.std() / math.sqrt(size) > 0
    return _first(shown / trials >= POWER, sizes)


def _right(z: Rows, labels: Ids, k: int) -> NDArray[np.float64]:
    """Precision at k of each query, (n,); of equal cosines any is taken."""
    cosines = z @ z.T
    np.fill_diagonal(cosines, -2)
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    found: NDArray[np.float64] = (labels[near] == labels[:, None]).mean(1)
    return found


def as_text(header: dict[str, str], found: LabelFindings, k: int) -> str:
    models = [["model", "R-Precision", f"precision at {k}"]]
    models += [[name, *(f"{100 * score:.2f}" for score in scores.values())] for name, scores in found.models.items()]
    ways = (COUPLES, UNIFORM, LABELS)
    lines = [["points apart", "of R-Precision", "differ", "spread", *ways]]
    for one in found.needed:
        answers = [f"{one.answers[way]:,}" if one.answers[way] is not None else "not by all" for way in ways]
        figures = [f"{one.gap:.2f}", f"{one.r_precision_gap:.2f}", f"{one.differing:.3f}", f"{one.spread:.2f}"]
        lines.append([*figures, *answers])
    return "\n\n".join([aligned_header(header), aligned(models), aligned(lines)])


SHORT = "how many answers about pairs tell two models apart"
DESCRIPTION = __doc__.split("\n\n", 1)[1]
EXAMPLE = """example, a minute, of a run of the demo:
  python launch/bench.py label --run runs/demo"""


def arguments(add: Callable[..., Any]) -> None:
    add("--run", required=True, metavar="DIR", help="a finished run whose test images have labels")
    add("--k", type=int, default=5, metavar="K", help="neighbours that count; default: %(default)s")
    add("--points", type=float, nargs="+", default=(1.0, 2.0, 5.0), metavar="POINTS", help="default: 1 2 5")
    add("--trials", type=int, default=200, metavar="T", help="orders of the questions; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = LabelSettings(**options | {"points": tuple(options["points"])})
    header = machine(1, "numpy", "torch")
    found = measure_label(settings, log)
    needed: Sequence[dict[str, Any]] = [vars(one) for one in found.needed]
    return as_text(header, found, settings.k), {"machine": header, "models": found.models, "needed": needed}
