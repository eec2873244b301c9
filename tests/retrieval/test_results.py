"""What `evaluate` found as text, JSON and CSV: every figure, what is left out, and the verdict last."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from grappa_dist.metrics import metrics_of
from grappa_dist.retrieval.results import describe, metric_name, write_results
from grappa_dist.retrieval.scores import Evaluated, Figure, Mixed, Scores, Searched
from grappa_dist.verdict import Gain


def scores(task: str | None, value: float) -> Scores:
    figures = {m: Figure(value, value - 0.02, value + 0.02) for m in metrics_of()}
    figures |= {"map_at_r": Figure(value - 0.1, 0, 1), "recall_at_1": Figure(value + 0.1, 0, 1)}
    return Scores(task, 50, 5, 2, value, value - 0.1, value + 0.1, value - 0.02, value + 0.02, figures)


def gain(task: str | None, low: float, high: float) -> Gain:
    return Gain(task, 100, 10, 0.62, 0.6, low, high, p_value=0.0004)


FOUND = Evaluated(
    {"average": "runs/mine (average, sha256 012345678901)", "backbone": "the backbone of runs/mine (backbone, ...)"},
    104,
    {"average": [scores("cars", 0.6), scores("a\nb", 0.64)], "backbone": [scores("cars", 0.6), scores("a\nb", 0.6)]},
    {"average": scores(None, 0.62), "backbone": scores(None, 0.6)},
    [gain(None, 0.01, 0.03), gain("cars", -0.01, 0.02), gain("a\nb", 0.02, 0.05)],
    [("x\x1b.png", "empty file")],
    ["3 images without a label: neither query nor searched"],
)


def test_the_text_has_every_task_of_both_models_what_is_left_out_and_the_verdict_last() -> None:
    lines = describe(FOUND).splitlines()
    assert " ".join(lines[3].split()) == (
        "task model queries classes R-Precision 95% interval MAP@R recall@1 recall@5 recall@10 precision@10 mAP@10"
    )
    assert " ".join(lines[4].split()) == "cars average 50 5 60.0 58.0 to 62.0 50.0 70.0 60.0 60.0 60.0 60.0"
    assert lines[6].split()[:3] == [r"a\nb", "average", "50"]
    assert lines[8].split()[:6] == ["mean", "of", "2", "tasks", "average", "50"]
    assert lines[10:] == [
        "2 images alone in a class: searched, but no query, as there is nothing to find",
        "note: 3 images without a label: neither query nor searched",
        "left out: 1 of 104 images could not be read",
        r"  x\x1b.png: empty file",
        "Better than the backbone: average is 2.0 points above the backbone in mean R-Precision over 2 tasks (95% "
        "interval +1.0 to +3.0, p < 0.001, 100 queries).",
    ]


@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [(-0.03, -0.01, "Worse than other: "), (-0.01, 0.03, "Not shown to be better than other")],
)
def test_the_verdict_says_what_the_interval_says(low: float, high: float, begins: str) -> None:
    named = {"average": "a", "other": "b"}
    found = replace(FOUND, models=named, gains=[gain("cars", low, high), gain("cars", low, high)])
    last = describe(found).splitlines()[-1]
    assert last.startswith(begins)
    assert "in R-Precision (95%" in last


def test_without_another_model_there_is_no_verdict() -> None:
    one = {"average": FOUND.scores["average"][:1]}
    found = replace(FOUND, models={"average": "a"}, scores=one, means={"average": scores(None, 0.6)}, gains=[])
    assert "than" not in describe(found)
    assert "mean of" not in describe(found)
    one_class = replace(found, scores={"average": [replace(one["average"][0], classes=1, queries=9)]})
    lines = describe(one_class).splitlines()
    assert "note: all queries are of one class, which tells no models apart: cars" in lines
    assert "note: few queries, so the interval is wide and itself rough: cars (9)" in lines


def test_json_and_csv_have_the_figures_as_fractions(tmp_path: Path) -> None:
    write_results(FOUND, tmp_path / "scores.json", tmp_path / "scores.csv")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["scores"]["average"][0]["r_precision"] == 0.6
    assert found["means"]["backbone"]["task"] is None
    assert [row["outcome"] for row in found["gains"]] == ["better", "unsure", "better"]
    assert found["gains"][0]["gain"] == pytest.approx(0.02)
    assert found["left_out"] == [{"file": "x\x1b.png", "reason": "empty file"}]
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["task"]) for row in rows[:2]] == [("average", "cars"), ("average", "a\nb")]
    assert float(rows[0]["low"]) == 0.58
    write_results(FOUND, None, None)


def test_queries_without_an_image_to_find_distractors_and_the_mixed_gallery_are_described() -> None:
    mixed = Mixed(FOUND.scores, FOUND.means, FOUND.gains)
    searched = Searched(leave_one_out=False, queries=50, gallery=1200, distractors=9000, copies=3)
    unmatched = [(f"{number}.png", "cars", "a\x1bb") for number in range(22)]
    lines = describe(replace(FOUND, mixed=mixed, searched=searched, unmatched=unmatched)).splitlines()
    assert lines[2] == (
        "in percent; 50 queries among the images of their task in a gallery of 1,200, and 9,000 distractors (3 more "
        "left out, which are labelled images, byte for byte)"
    )
    assert lines[10] == "the same queries among the images of all tasks"
    place = lines.index("22 queries not scored: the gallery has no image of their class, or none but themselves")
    assert lines[place + 1] == r"  0.png (cars, a\x1bb)"
    assert lines[place + 21] == "  and 2 more (--json FILE lists all)"


def test_the_csv_has_every_metric_with_its_interval_in_both_galleries(tmp_path: Path) -> None:
    found = replace(FOUND, mixed=Mixed(FOUND.scores, FOUND.means, FOUND.gains))
    write_results(found, None, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gallery"] for row in rows] == ["task"] * 4 + ["all"] * 4
    assert (rows[0]["map_at_10"], rows[0]["map_at_10_low"], rows[0]["map_at_r_high"]) == ("0.6", "0.58", "1")
    assert [metric_name(m) for m in metrics_of((1, 5))[:4]] == ["R-Precision", "MAP@R", "recall@1", "recall@5"]
