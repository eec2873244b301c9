"""Figures by task, class and query."""

from __future__ import annotations

import numpy as np
import pytest

from grappa_dist.metrics import as_fractions, metrics_of
from grappa_dist.retrieval.ranking import Ranking
from grappa_dist.retrieval.scores import (
    Queries,
    class_scores,
    compared,
    mean_scores,
    most_changed,
    task_scores,
    worst_queries,
)
from grappa_dist.significance import bootstrap_interval

QUERIES = 24


def ranking(seed: int) -> Ranking:
    draws = np.random.default_rng(seed)
    units = draws.integers(0, 5, (QUERIES, len(metrics_of()))) * 2**38
    return Ranking(units, draws.integers(0, QUERIES, (QUERIES, 10)), draws.random((QUERIES, 10)))


def queries(*models: str) -> Queries:
    tasks = np.arange(QUERIES) % 3
    classes = tasks * 2 + (np.arange(QUERIES) >= 12)
    rankings = {model: ranking(seed) for seed, model in enumerate(models)}
    return Queries(np.arange(QUERIES) + 100, tasks, classes, rankings, list("xyz"), list("abcdef"))


def test_every_metric_of_a_task_has_its_mean_and_the_interval_of_its_queries() -> None:
    found = queries("m")
    scores = task_scores(found, "m", {1: 4})
    assert [(s.task, s.queries, s.classes, s.alone) for s in scores] == [("x", 8, 2, 0), ("y", 8, 2, 4), ("z", 8, 2, 0)]
    for column, metric in enumerate(metrics_of()):
        values = as_fractions(found.rankings["m"].units[1::3, column])
        assert scores[1].figures[metric] == (pytest.approx(values.mean()), *bootstrap_interval([values]))
    mean = mean_scores(found, "m", {1: 4})
    assert (mean.task, mean.queries, mean.classes, mean.alone) == (None, 24, 6, 4)
    of_tasks = [as_fractions(found.rankings["m"].units[task::3, 0]) for task in range(3)]
    assert (mean.low, mean.high) == bootstrap_interval(of_tasks)
    assert mean.r_precision == pytest.approx(np.mean([s.r_precision for s in scores]))
    assert compared(found) == []


def test_classes_add_up_to_their_tasks() -> None:
    found = queries("m", "n")
    classes = class_scores(found)
    assert [(one.task, one.label, one.queries) for one in classes] == [
        (*pair, 4) for pair in ("xa", "xb", "yc", "yd", "ze", "zf")
    ]
    gain = np.mean([one.gain("map_at_r") for one in classes])
    assert gain == pytest.approx(compared(found, "map_at_r")[0].gain)
    assert class_scores(queries("m"))[0].gain() == 0


def test_the_worst_queries_come_first_and_no_class_fills_the_list() -> None:
    found = queries("m", "n")
    worst = worst_queries(found, "m", 6, each=1)
    assert len(set(found.classes[worst].tolist())) == 6
    values = found.units("m", "r_precision")
    assert all(values[place] == values[found.classes == found.classes[place]].min() for place in worst)
    assert len(set(worst_queries(found, "m", 100))) == QUERIES


def test_the_most_changed_queries_gain_or_lose_and_others_are_not_listed() -> None:
    found = queries("m", "n")
    difference = found.units("m", "r_precision") - found.units("n", "r_precision")
    up, down = most_changed(found, 100)
    assert sorted(up) == np.flatnonzero(difference > 0).tolist()
    assert sorted(down) == np.flatnonzero(difference < 0).tolist()
    assert difference[up[0]] == difference.max()
    assert difference[down[0]] == difference.min()
