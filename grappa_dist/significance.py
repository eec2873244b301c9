"""How sure a difference between two models is, from the same queries scored by both.

A task is an array (q,) of one value per query, such as the R-Precision of a model less that of the backbone; the figure
in question is the mean over tasks of the mean over a task's queries. Both functions take queries as independent draws
and the tasks, their classes and the two models as given: neither says how another seed of training, or images of other
classes, would come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating]
DRAWS = 2000
_AT_ONCE = 2**22  # numbers drawn at once
_ROUNDING = 1e-9  # relative: sums in other orders that differ by less are equal


def mean_over_tasks(tasks: Sequence[Values]) -> float:
    """The mean over tasks of the mean over a task's queries.

    Raises:
        ValueError: there is no task, or one without queries.
    """
    return float(np.mean([task.mean() for task in _checked(tasks)]))


def bootstrap_interval(
    tasks: Sequence[Values], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over tasks: queries are drawn anew within each task.

    Args:
        tasks: one array (q,) per task; q may differ.
        level: of confidence, in (0, 1).
        draws: resamples of all queries.

    Raises:
        ValueError: there is no task, or one without queries.
    """
    columns = [task[:, None] for task in _checked(tasks)]
    return bootstrap_intervals(columns, level=level, draws=draws, seed=seed)[0]


def bootstrap_intervals(
    tasks: Sequence[Values], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> list[tuple[float, float]]:
    """The interval of each of several figures of the same queries, which are drawn once: `bootstrap_interval` of each.

    Args:
        tasks: one array (q, m) per task, a column for each figure.

    Raises:
        ValueError: there is no task, or one without queries.
    """
    _checked([task[:, 0] for task in tasks])
    rng, means = np.random.default_rng(seed), np.zeros((tasks[0].shape[1], draws))
    for task in tasks:
        figures = [np.ascontiguousarray(figure) for figure in task.T]
        for part in _parts(draws, len(task)):
            picked = rng.integers(0, len(task), (part.stop - part.start, len(task)), dtype=np.int32)
            for of_figure, figure in zip(means, figures, strict=True):
                of_figure[part] += figure[picked].mean(1) / len(tasks)
    bounds = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return [(low, high) for low, high in bounds.T.tolist()]


def paired_test(tasks: Sequence[Values], *, draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p value of the sign-flip permutation test: each difference might as well have the other sign.

    All signs of m differences that are not zero are tried where there are at most `draws` of them, 2**m; else `draws`
    random ones, and p is at least 1 / (draws + 1).

    Args:
        tasks: the differences, one array (q,) per task.

    Raises:
        ValueError: there is no task, or one without queries.
    """
    weighted = np.concatenate([task / (len(task) * len(tasks)) for task in _checked(tasks)])
    weighted = weighted[weighted != 0]
    found, exact = abs(weighted.sum()), len(weighted) < draws.bit_length()
    count = 2 ** len(weighted) if exact else draws
    rng, extreme = np.random.default_rng(seed), 0
    for part in _parts(count, len(weighted)):
        size = (part.stop - part.start, len(weighted))
        if exact:
            kept: NDArray[Any] = np.arange(part.start, part.stop)[:, None] >> np.arange(len(weighted)) & 1
        else:
            kept = np.unpackbits(rng.integers(0, 256, (size[0], -(-size[1] // 8)), np.uint8), axis=1, count=size[1])
        sums = np.abs(2 * (kept @ weighted) - weighted.sum())
        extreme += int((sums >= found * (1 - _ROUNDING)).sum())
    return extreme / count if exact else (extreme + 1) / (count + 1)


def _parts(draws: int, size: int) -> Iterator[slice]:
    """The draws in parts that fit in memory."""
    step = max(1, _AT_ONCE // max(1, size))
    yield from (slice(start, min(start + step, draws)) for start in range(0, draws, step))


def _checked(tasks: Sequence[Values]) -> Sequence[Values]:
    if not tasks or any(task.ndim != 1 or not len(task) for task in tasks):
        raise ValueError(f"expected tasks of one value per query, got shapes {[np.shape(task) for task in tasks]}")
    return tasks
