from __future__ import annotations

import pytest

from grappa_dist.report.content import ScoreRow
from grappa_dist.report.seeds import seeds_conclusion, seeds_json, seeds_lines, seeds_page, seeds_table
from grappa_dist.verdict import SeedsVerdict
from tests.report.test_verdict import gain


def rows(backbone: float, average: float) -> list[ScoreRow]:
    return [
        {"model": m, "task": "birds", "queries": 9, "r_precision": v, "map_at_r": v, "recall_at_1": v}
        for m, v in (("backbone", backbone), ("average", average))
    ]


def verdict(by: float, each: tuple[float, ...], exported: str = "average") -> SeedsVerdict:
    mean, tasks = gain(None, by, 0.004, 800), (gain("birds", by), gain("cars", by))
    return SeedsVerdict((0, 1, 2), (exported,) * 3, each, "auto", mean, tasks, ())


def test_the_table_has_mean_and_standard_deviation() -> None:
    lines = seeds_table({0: rows(0.4, 0.5), 1: rows(0.4, 0.52), 2: rows(0.4, 0.54)}).splitlines()
    assert "over the seeds 0, 1, 2" in lines[0]
    assert [line.split() for line in lines[2:]] == [["backbone", "40.0", "±0.0"], [], ["average", "52.0", "±2.0"]]


@pytest.mark.parametrize(
    ("found", "begins"),
    [
        (verdict(0.012, (0.010, 0.012, 0.014)), "Better than the backbone: over 3 seeds the exported model is 1.2 "),
        (verdict(0.012, (-0.001, 0.020, 0.017)), "Not shown to be better than the backbone"),  # one seed is below it
        (verdict(0.001, (0.001, 0.001, 0.001)), "Not shown to be better than the backbone"),
        (verdict(-0.012, (-0.010, -0.012, -0.014)), "Worse than the backbone: over 3 seeds the exported model is 1.2 "),
        (verdict(0.0, (0.0, 0.0, 0.0), "backbone"), "No seed gave a model that is better than the backbone"),
    ],
)
def test_the_conclusion_takes_the_interval_and_every_seed(found: SeedsVerdict, begins: str) -> None:
    assert seeds_conclusion(found, "runs/my photos").startswith(begins)
    assert seeds_lines(found, "runs/my photos")[-1] == seeds_conclusion(found, "runs/my photos").replace("−", "-")


def test_the_gain_of_each_seed_is_shown() -> None:
    lines = seeds_lines(verdict(0.012, (0.010, 0.012, 0.014)), "runs/my photos")
    assert "  seed 2: average, +1.4 points" in lines
    assert "by seed +1.0 to +1.4" in lines[-1]


def test_the_page_draws_the_gains_of_tasks_and_seeds() -> None:
    found = verdict(0.012, (-0.001, 0.020, 0.017))
    page = seeds_page("mine", {seed: rows(0.4, 0.5) for seed in range(3)}, found)
    assert page.count("<circle") == 6  # the mean, two tasks, three seeds
    assert "<b>Not shown to be better than the backbone" in page
    assert "52.0 ±2.0" in seeds_page("mine", {0: rows(0.4, 0.5), 1: rows(0.4, 0.52), 2: rows(0.4, 0.54)}, found)
    assert "no labelled test images" in seeds_page("mine", {0: [], 1: []}, None)


def test_the_file_has_every_score_by_seed_and_the_verdict() -> None:
    found = seeds_json({0: rows(0.4, 0.5), 1: rows(0.4, 0.52)}, verdict(0.012, (0.010, 0.012, 0.014)))
    assert found["rows"][1]["r_precision"]["by_seed"] == [0.5, 0.52]
    assert found["verdict"]["gains"] == {"0": 0.010, "1": 0.012, "2": 0.014}
    assert seeds_json({0: rows(0.4, 0.5)}, None)["verdict"] is None
