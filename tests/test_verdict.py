from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from grappa_dist.verdict import (
    FEW,
    TRAINED_ON,
    TaskQueries,
    candidates,
    choose,
    gains,
    validation_half,
    verdict_on,
    verdict_over,
)

MODELS = ("backbone", "k=4", "k=16", "average", "neighbours")


def task(name: str, sizes: tuple[int, ...], **shifts: float) -> TaskQueries:
    """Classes of these sizes; models differ from the backbone by their shift, and by noise."""
    classes = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(len(name))
    base = rng.integers(20, 60, len(classes)) / 100
    noise = {m: rng.integers(-5, 6, len(classes)) / 1000 for m in MODELS if m != "backbone"}
    others = {m: base + shifts.get(m.replace("=", ""), 0.0) + noise[m] for m in noise}
    return TaskQueries(name, classes, {"backbone": base, **others})


@pytest.mark.parametrize("sizes", [(2,), (2, 2, 2), (3, 5, 2, 7), (1, 1, 1, 1), (40, 2)])
def test_the_queries_of_each_class_are_divided_evenly_and_always_the_same(sizes: tuple[int, ...]) -> None:
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) + 7, sizes))
    half = validation_half(classes)
    assert abs(int(half.sum()) - int((~half).sum())) <= 1
    for label, size in zip(range(7, 7 + len(sizes)), sizes, strict=True):
        assert abs(2 * int(half[classes == label].sum()) - size) <= 1
    assert np.array_equal(half, validation_half(classes.copy()))


def test_the_division_is_shuffled_and_is_this_one() -> None:
    half = validation_half(np.zeros(12, np.int64))
    assert half.astype(int).tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1]


def test_candidates_are_the_simplest_first_without_baselines_labels_and_gallery() -> None:
    models = [*reversed(MODELS), "gallery", "random-one", "random-all", "supervised", "supervised-set", "transforms"]
    assert candidates(models) == ["backbone", "average", "k=4", "k=16", "transforms", "neighbours"]


def test_of_a_fusion_at_several_strengths_the_least_is_the_first_candidate() -> None:
    weaker = ["neighbours@0.5", "average@2", "average@0.5", "average@0", "neighbours@0.25", "average@0.25"]
    assert candidates([*MODELS, *weaker, "gallery", "gallery@0.5", "random-one@0.5", "supervised"]) == [
        "backbone",
        *["average@0", "average@0.25", "average@0.5", "average", "average@2"],
        *["k=4", "k=16"],
        *["neighbours@0.25", "neighbours@0.5", "neighbours"],
    ]
    assert candidates(["neighbours@0.5", "k=4"]) == ["k=4", "neighbours@0.5"]


def test_the_best_mean_over_tasks_is_chosen_and_the_first_of_equals() -> None:
    equal = np.array([0.1, 0.2, 0.3, 0.4])
    of_equals: Mapping[str, NDArray[np.float64]] = {"backbone": equal, "average": equal[::-1], "k=4": equal}
    tasks = [TaskQueries("a", np.zeros(4, np.int64), of_equals)]
    assert choose(tasks, ["average", "backbone", "k=4"])[0] == "average"
    large, small = task("large", (60, 60), neighbours=0.1), task("a", (4, 4), neighbours=-0.3)
    best, means = choose([large, small], MODELS)
    assert best != "neighbours"  # every task counts once, whatever its size
    expected = np.mean([large.r_precision["neighbours"].mean(), small.r_precision["neighbours"].mean()])
    assert means["neighbours"] == pytest.approx(expected)


def test_a_better_model_is_chosen_on_one_half_and_its_gain_is_of_the_other() -> None:
    tasks = [task("a", (9, 9, 9), k16=0.05), task("bc", (40, 3), k16=0.1)]
    found = verdict_on(tasks, MODELS, "auto")
    assert (found.exported, found.compared, found.mean.outcome) == ("k=16", "k=16", "better")
    assert set(found.validation) == set(MODELS)
    chosen = [validation_half(t.classes) for t in tasks]
    expected = [t.less("k=16", "backbone")[~half].mean() for t, half in zip(tasks, chosen, strict=True)]
    assert [g.gain for g in found.tasks] == pytest.approx(expected)
    assert found.mean.gain == pytest.approx(np.mean(expected))
    means = [t.r_precision["average"][half].mean() for t, half in zip(tasks, chosen, strict=True)]
    assert found.validation["average"] == pytest.approx(np.mean(means))
    assert found.mean.queries + found.validation_queries == 70
    assert [g.classes for g in found.tasks] == [3, 2]


def test_where_the_backbone_is_best_it_is_exported_and_the_best_other_is_compared_with_it() -> None:
    shifts = {m.replace("=", ""): -0.1 for m in MODELS} | {"k4": -0.05}
    found = verdict_on([task("a", (30, 30), **shifts)], MODELS, "auto")
    assert (found.exported, found.compared, found.mean.outcome) == ("backbone", "k=4", "worse")
    assert found.mean.low < found.mean.gain < found.mean.high < 0
    assert found.mean.p_value < 0.01


def test_a_model_that_was_asked_for_is_compared_on_all_queries() -> None:
    tasks = [task("a", (30, 30), neighbours=0.001)]
    found = verdict_on(tasks, MODELS, "neighbours")
    assert (found.exported, found.validation, found.validation_queries) == ("neighbours", {}, 0)
    assert found.mean == gains(tasks, "neighbours")[0]
    assert found.mean.queries == 60
    asked = verdict_on([task("a", (30, 30), neighbours=0.1)], MODELS, "backbone")
    assert (asked.exported, asked.compared) == ("backbone", "neighbours")


@pytest.mark.parametrize(
    ("queries", "changed", "p", "outcome"),
    [(2, 2, 0.5, "unsure"), (3, 3, 0.25, "unsure"), (30, 4, 0.125, "unsure"), (30, 6, 0.03125, "better")],
)
def test_few_queries_that_changed_are_no_finding_though_the_interval_is_above_zero(
    queries: int, changed: int, p: float, outcome: str
) -> None:
    for sign, expected in ((1, outcome), (-1, outcome.replace("better", "worse"))):
        base, shift = np.full(queries, 0.5), sign * 0.1 * (np.arange(queries) < changed)
        found = gains([TaskQueries("a", np.zeros(queries, np.int64), {"backbone": base, "k=4": base + shift})], "k=4")
        assert min(sign * found[0].low, sign * found[0].high) > 0
        assert (found[0].p_value, found[0].outcome) == (p, expected)


def test_equal_models_are_no_finding() -> None:
    same = task("a", (20, 20))
    same = TaskQueries("a", same.classes, dict.fromkeys(MODELS, same.r_precision["backbone"]))
    found = verdict_on([same], MODELS, "auto")
    assert (found.exported, found.compared) == ("backbone", "average")
    assert (found.mean.gain, found.mean.low, found.mean.high, found.mean.p_value) == (0, 0, 0, 1)
    assert found.mean.outcome == "unsure"


def test_few_queries_one_class_and_one_task_are_stated() -> None:
    alone = verdict_on([task("birds", (4, 4))], MODELS, "auto").caveats
    assert len(alone) == 2
    assert "few queries" in alone[0]
    assert "birds (4)" in alone[0]
    assert "one task" in alone[1]
    many = (FEW, FEW)
    assert verdict_on([task("a", many), task("bc", many)], MODELS, "auto").caveats == ()
    single = verdict_on([task("a", many), task("cars", (2 * FEW,))], MODELS, "auto").caveats
    assert len(single) == 1
    assert "one class" in single[0]
    assert "cars" in single[0]


def test_test_images_that_the_models_were_adapted_to_are_a_caveat_also_over_seeds() -> None:
    tasks = [task("a", (FEW, FEW)), task("b", (FEW, FEW))]
    found = verdict_on(tasks, MODELS, "auto", trained_on=True)
    assert found.caveats == (TRAINED_ON,)
    assert verdict_on(tasks, MODELS, "average", trained_on=True).caveats == (TRAINED_ON,)
    assert verdict_over({0: (tasks, found), 1: (tasks, found)}).caveats == (TRAINED_ON,)
