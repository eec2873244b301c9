from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from grappa_dist.significance import bootstrap_interval, mean_over_tasks, paired_test

Array = NDArray[np.float64]


def draws(size: int, seed: int = 0, shift: float = 0.2) -> Array:
    return np.random.default_rng(seed).normal(shift, 1, size).round(1)


def test_the_mean_counts_every_task_once() -> None:
    assert mean_over_tasks([np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.5])]) == 0.375


def test_the_interval_is_that_of_scipy() -> None:
    values = draws(60)
    low, high = bootstrap_interval([values], draws=20_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert [low, high] == pytest.approx([theirs.low, theirs.high], abs=0.05 * (high - low))


def test_the_interval_over_tasks_is_that_of_scipy_on_queries_drawn_within_each() -> None:
    tasks = draws(40), draws(90, seed=1, shift=-0.3)
    low, high = bootstrap_interval(tasks, level=0.9, draws=20_000)

    def mean(*parts: Array, axis: int) -> Array:
        found: Array = sum(part.mean(axis) for part in parts) / len(parts)
        return found

    theirs = stats.bootstrap(
        tasks, mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert [low, high] == pytest.approx([theirs.low, theirs.high], abs=0.05 * (high - low))


def test_the_interval_is_a_function_of_the_seed_and_holds_where_draws_come_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = [draws(30), draws(7, seed=5)]
    found = bootstrap_interval(tasks, seed=4)
    assert found == bootstrap_interval(tasks, seed=4) != bootstrap_interval(tasks, seed=5)
    monkeypatch.setattr("grappa_dist.significance._AT_ONCE", 100)
    low, high = bootstrap_interval(tasks, seed=4)
    assert [low, high] == pytest.approx(found, abs=0.1 * (found[1] - found[0]))


def test_a_wider_level_holds_a_narrower_one_and_equal_queries_have_no_spread() -> None:
    wide, narrow = (bootstrap_interval([draws(50)], level=level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval([np.full(9, 0.25), np.full(3, 0.75)]) == (0.5, 0.5)


def every_sign(tasks: Sequence[Array]) -> float:
    """The p value by its definition."""
    found, all_means = abs(mean_over_tasks(tasks)), []
    flat = np.concatenate(tasks)
    ends = np.cumsum([len(task) for task in tasks])[:-1]
    for signs in itertools.product((-1, 1), repeat=len(flat)):
        all_means.append(abs(mean_over_tasks(np.split(flat * np.array(signs), ends))))
    return float(np.mean([mean >= found - 1e-12 for mean in all_means]))


@pytest.mark.parametrize("tasks", [[draws(8)], [draws(3), draws(5, seed=1)], [np.array([0.5, 0.0, 0.5, -0.5])]])
def test_the_p_value_of_few_queries_is_exact(tasks: list[Array]) -> None:
    assert paired_test(tasks) == pytest.approx(every_sign(tasks), abs=1e-12)


def test_the_exact_p_value_is_that_of_scipy() -> None:
    values = draws(9, seed=2, shift=0.5)
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert paired_test([values]) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.3])
def test_the_p_value_of_many_queries_is_near_that_of_scipy(shift: float) -> None:
    values = draws(150, seed=3, shift=shift)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert paired_test([values], draws=20_000) == pytest.approx(theirs.pvalue, abs=0.02)


def test_equal_models_are_no_finding_and_a_sure_difference_is_one() -> None:
    assert paired_test([np.zeros(40)]) == 1
    assert paired_test([np.full(200, 0.1)]) == 1 / 2001
    assert paired_test([-np.full(200, 0.1)]) == 1 / 2001


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    found = [paired_test([draws(30, seed=seed, shift=0.0)], seed=seed) for seed in range(200)]
    assert 0.02 < np.mean(np.array(found) < 0.1) < 0.2


def test_flips_drawn_in_parts_give_about_the_same_p_value(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [draws(41, seed=7, shift=0.25)]
    whole = paired_test(values, draws=5000)
    monkeypatch.setattr("grappa_dist.significance._AT_ONCE", 1000)
    assert paired_test(values, draws=5000) == pytest.approx(whole, abs=0.03)


@pytest.mark.parametrize("tasks", [[], [np.zeros(0)], [np.zeros((2, 2))]])
@pytest.mark.parametrize("function", [mean_over_tasks, bootstrap_interval, paired_test])
def test_what_has_no_queries_is_refused(function: object, tasks: list[Array]) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="one value per query"):
        function(tasks)
