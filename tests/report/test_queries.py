"""Intervals, gains by class and the queries that changed most, from the values of single queries."""

from __future__ import annotations

import numpy as np
import pytest

from grappa_dist.report import queries
from grappa_dist.report.queries import MOST_CHANGED, MOST_PER_TASK, changed_most, class_gains, intervals_of
from grappa_dist.significance import bootstrap_interval
from grappa_dist.verdict import TaskQueries


def task(name: str, seed: int, queries: int = 40, classes: int = 5) -> TaskQueries:
    rng = np.random.default_rng(seed)
    values = {m: rng.integers(0, 5, queries) / 4 for m in ("backbone", "k=4", "k=8", "average")}
    return TaskQueries(name, np.arange(queries) % classes, values, 100 + np.arange(queries))


def test_intervals_are_the_bootstrap_of_the_values_of_each_task_and_of_the_mean_over_tasks() -> None:
    tasks = [task("a", 0), task("b", 1, 7)]
    found = intervals_of(tasks)
    assert len(found) == 5 * 3
    for model in ("backbone", "average"):
        values = [t.r_precision[model] for t in tasks]
        assert found[model, "b"] == bootstrap_interval(values[1:])
        assert found[model, None] == bootstrap_interval(values)
    for (model, name), (low, high) in found.items():
        if model != "oracle" and name is not None:
            mean = next(t for t in tasks if t.task == name).r_precision[model].mean()
            assert low <= mean <= high
    best = [max(("k=4", "k=8"), key=lambda m: t.r_precision[m].mean()) for t in tasks]
    assert found["oracle", "a"] == found[best[0], "a"]
    assert intervals_of([]) == {}


def test_of_many_queries_intervals_are_those_of_the_bootstrap_to_a_part_of_their_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queries, "MANY", 1000)
    tasks = [task("a", 0, 1001), task("b", 1, 400)]
    (low, high), wide = bootstrap_interval([t.r_precision["average"] for t in tasks]), intervals_of(tasks)
    for model, name in (("average", None), ("average", "a")):
        expected = (low, high) if name is None else bootstrap_interval([tasks[0].r_precision[model]])
        assert wide[model, name] == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_the_gain_of_a_class_is_the_mean_over_its_queries() -> None:
    one = task("a", 2)
    found = class_gains([one], "average")
    assert [(g.task, g.label, g.queries) for g in found] == [("a", label, 8) for label in range(5)]
    for g in found:
        of_class = one.classes == g.label
        assert g.value == pytest.approx(one.r_precision["average"][of_class].mean())
        assert g.gain == pytest.approx(one.less("average", "backbone")[of_class].mean())
    whole = one.less("average", "backbone").mean()
    assert sum(g.gain * g.queries for g in found) / 40 == pytest.approx(whole)


def test_the_queries_that_changed_most_are_those_with_the_largest_differences() -> None:
    one = task("a", 3)
    gains, found = one.less("average", "backbone"), changed_most(one, "average", "backbone", 1)
    for why, largest in (("improved", gains.max()), ("worsened", gains.min())):
        picked = [pick for pick in found if pick.why == why]
        assert len(picked) == MOST_PER_TASK
        assert picked[0].value - picked[0].baseline == pytest.approx(largest)
        assert all(pick.value == one.r_precision["average"][pick.place] for pick in picked)
    worst = [pick for pick in found if pick.why == "worst"]
    assert {pick.value for pick in worst} == {one.r_precision["average"].min()}


def test_of_equal_queries_each_class_is_shown_once_before_any_is_shown_twice() -> None:
    values = {"backbone": np.ones(12), "average": np.zeros(12)}
    one = TaskQueries("a", np.repeat(np.arange(4), 3), values)
    for why in ("worsened", "worst"):
        places = [pick.place for pick in changed_most(one, "average", "backbone", 1) if pick.why == why]
        assert places == [0, 3, 6][:MOST_PER_TASK]


def test_queries_that_stay_as_they_are_are_no_changes_and_perfect_ones_are_no_worst_ones() -> None:
    same = TaskQueries("a", np.zeros(4, np.int64), {"backbone": np.ones(4), "average": np.ones(4)})
    assert changed_most(same, "average", "backbone", 1) == []


def test_many_tasks_share_the_page() -> None:
    for num_tasks in (1, 12, 1000):
        found = changed_most(task("a", 4), "average", "backbone", num_tasks)
        each = sum(pick.why == "improved" for pick in found)
        assert each == max(1, min(MOST_PER_TASK, MOST_CHANGED // num_tasks))
