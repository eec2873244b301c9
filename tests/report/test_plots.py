"""Charts: thinned lines, round ticks, log scales, counts of cluster sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grappa_dist.report.plots import Axes, Series, line_chart, thin, ticks
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
