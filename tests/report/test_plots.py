"""Charts: thinned lines, round ticks, log scales, counts of cluster sizes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from grappa_dist.report.plots import Axes, Series, bar_chart, line_chart, log_ticks, thin, tick_labels, ticks
from grappa_dist.stages.pseudo_label import size_histogram


def test_thinning_keeps_the_mean_and_counts_what_is_not_finite() -> None:
    y = [float(i) for i in range(1000)] + [math.nan] * 24
    xs, ys, broken = thin(range(len(y)), y, most=64)
    assert len(xs) == len(ys) == 64
    assert broken == 24
    finite = [v for v in ys if math.isfinite(v)]
    assert finite == sorted(finite)
    assert np.mean(thin(range(1024), y[:1000] + [7.0] * 24, most=64)[1]) == pytest.approx(
        np.mean(y[:1000] + [7.0] * 24)
    )


def test_a_short_line_is_left_as_it_is() -> None:
    assert thin([1, 2], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0], 0)


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.13, 0.87) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(5, 5) == [5]


@pytest.mark.parametrize(
    ("low", "high", "labels", "scale"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], ""),
        (0.9998, 1.0002, ["0.9998", "0.9999", "1.0000", "1.0001", "1.0002"], ""),
        (-3.0, 2.0, ["−3", "−2", "−1", "0", "1", "2"], ""),
        (0.0, 1e-3, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], "× 10⁻³"),
        (123_000, 123_400, ["1.230", "1.231", "1.232", "1.233", "1.234"], "× 10⁵"),
        (40_000, 90_000, ["40,000", "50,000", "60,000", "70,000", "80,000", "90,000"], ""),
    ],
)
def test_labels_of_ticks_differ_and_are_short(low: float, high: float, labels: list[str], scale: str) -> None:
    assert tick_labels(ticks(low, high)) == (labels, scale)


@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0], [0.99996, 0.99999], [0.0, 0.0], [1e-7, 1.00001e-7], [5e8, 5e8 + 1], [-2.0, -2.0], [1e-3, 1.0]],
    ids=str,
)
def test_an_axis_has_labels_that_differ_also_of_values_that_hardly_do(values: list[float]) -> None:
    chart = line_chart([Series("a", [1, 2], values)], Axes(title="t"))
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', chart)
    assert len(labels) == len(set(labels)) >= 3
    assert max(map(len, labels)) <= 7


def test_counts_have_whole_ticks() -> None:
    chart = bar_chart([1.0, 0.0], ["0", "1"], Axes(title="t"))
    assert re.findall(r'text-anchor="end">([^<]+)</text>', chart) == ["0", "1"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 2000.0, [1.0, 10.0, 100.0, 1000.0]),
        (1.5, 60.0, [3.0, 10.0, 30.0]),
        (3.0, 4.0, [3.0, 3.2, 3.4, 3.6, 3.8, 4.0]),
        (1e-12, 1.0, [1e-12, 1e-9, 1e-6, 1e-3, 1.0]),
    ],
)
def test_ticks_of_a_log_scale_are_few_and_round(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_a_value_that_is_not_finite_splits_the_line() -> None:
    chart = line_chart([Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 2.0, 1.0])], Axes(title="t"))
    path = chart.split('class="line" d="')[1].split('"')[0]
    assert path.count("M") == 2


def test_a_log_chart_leaves_out_what_is_not_positive() -> None:
    chart = line_chart([Series("a", [0, 1, 2], [100.0, 0.0, 1.0])], Axes(title="t", log_y=True))
    assert chart.count("<circle") == 2


def test_cluster_sizes_are_counted_by_powers_of_two() -> None:
    assert size_histogram([0, 1, 2, 3, 4, 7, 8]) == [1, 1, 2, 2, 1]
    assert size_histogram(np.array([2**40])) == [0] * 41 + [1]
    assert size_histogram([]) == []
