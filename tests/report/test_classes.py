"""The section on classes: counts and bars add up, a few classes are all listed, of thousands both ends."""

from __future__ import annotations

import re

import numpy as np
import pytest

from grappa_dist.report.classes import MOST_LISTED, MOST_TASKS, classes_section, count_outcomes, histogram
from grappa_dist.report.queries import ClassGain


def gains(count: int, tasks: int = 1) -> list[ClassGain]:
    values = np.random.default_rng(0).permutation(np.linspace(-0.5, 0.5, count)).tolist()
    return [ClassGain(f"task {i % tasks}", i, 4, 0.5 + v / 2, 0.5 - v / 2) for i, v in enumerate(values)]


def names(section: str) -> list[str]:
    return re.findall(r'<th scope="row">(class \d+)<', section)


@pytest.mark.parametrize(
    ("gain", "bar"),
    [
        (-1.0, 0),
        (-0.1001, 0),
        (-0.1, 1),
        (-0.03, 2),
        (-0.0006, 2),
        (0.0, 3),
        (0.0004, 3),
        (0.001, 4),
        (0.04, 5),
        (1, 6),
    ],
)
def test_every_gain_has_its_bar(gain: float, bar: int) -> None:
    found = histogram([ClassGain("a", 0, 1, gain, 0.0)])
    assert found.index(1.0) == bar
    assert sum(found) == 1


def test_bars_and_counts_add_up_to_all_classes() -> None:
    found = gains(999)
    better, worse, same = count_outcomes(found)
    assert better + worse + same == sum(histogram(found)) == 999
    assert same == histogram(found)[3]


def test_a_few_classes_are_all_listed_from_gain_to_loss() -> None:
    found, called = gains(MOST_LISTED), [f"class {i}" for i in range(MOST_LISTED)]
    section = classes_section(found, called, "average")
    by_gain = sorted(found, key=lambda g: -g.gain)
    assert names(section) == [f"class {g.label}" for g in by_gain]
    assert ">task<" not in section


def test_of_many_classes_both_ends_are_listed_and_the_page_does_not_grow() -> None:
    found, called = gains(5000, 3), [f"class {i}" for i in range(5000)]
    section = classes_section(found, called, "average")
    by_gain = sorted(found, key=lambda g: -g.gain)
    half = MOST_LISTED // 2
    assert names(section)[:half] == [f"class {g.label}" for g in by_gain[:half]]
    assert names(section)[half : 2 * half] == [f"class {g.label}" for g in by_gain[: -half - 1 : -1]]
    assert "of 5,000 classes, 2,498 better, 2,498 worse, 4 the same" in section
    assert len(section) < 40_000


def test_of_many_tasks_the_first_are_listed() -> None:
    section = classes_section(gains(1000, 400), [], "average")
    assert f"{400 - MOST_TASKS} more tasks not shown" in section


def test_names_of_classes_are_text() -> None:
    section = classes_section(gains(2), ["<script>", "b" * 1000], "average")
    assert "&lt;script&gt;" in section
    assert "b" * 100 not in section
    assert classes_section([], [], "average") == ""
