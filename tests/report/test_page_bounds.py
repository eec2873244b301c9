"""How large a page gets: thousands of classes, a hundred tasks, names of any length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from grappa_dist.report.content import ChangedQuery, Gallery, Hit, LabelFree, ReportContent
from grappa_dist.report.queries import class_gains, intervals_of
from grappa_dist.report.scores import MOST_COLUMNS
from grappa_dist.verdict import TaskQueries, verdict_on
from tests.report.test_page import clustering, png, render, score

MODELS = ("backbone", "k=4", "k=16", "k=64", "k=256", "oracle", "average", "transforms", "neighbours", "gallery")
MOST_BYTES = 8_000_000  # of a page without its images, as docs/report.md says
LONG = "a/very/long/folder/of/images/" * 9


def large(num_tasks: int, num_classes: int) -> ReportContent:
    """A report on many tasks and classes, 2 queries each, with all that grows with them."""
    rng, classes = np.random.default_rng(0), np.arange(num_classes)
    tasks = []
    for number in range(num_tasks):
        own = np.repeat(classes[number::num_tasks], 2)
        values = {m: rng.integers(0, 2, len(own)).astype(np.float64) for m in MODELS if m != "oracle"}
        tasks.append(TaskQueries(f"task {number} {LONG}", own, values))
    names = [task.task for task in tasks]
    hits = [Hit(image=png(i), score=0.9, correct=False, name=f"{LONG}/{i}.jpg") for i in range(5)]
    queries = [
        Gallery(query=png(9), task=name, label=LONG, name=LONG, results=dict.fromkeys(MODELS, hits))
        for name in names * 8
    ]
    two, maps = dict.fromkeys(("backbone", "average"), hits), [[0.25] * 4] * 12
    return ReportContent(
        title=LONG,
        rows=[score(model, name, 0.4, 100) for model in MODELS for name in names],
        intervals=intervals_of(tasks[:2]),
        verdict=verdict_on(tasks, [m for m in MODELS if m != "oracle"], "auto"),
        classes=class_gains(tasks, "average"),
        class_names=[f"class {i} {LONG}" for i in range(num_classes)],
        changed=[
            ChangedQuery(why=why, gallery=replace(query, results=two), value=0.1, baseline=0.2)
            for query in queries
            for why in ("improved", "worsened", "worst")  # type: ignore[misc]
        ],
        galleries=queries,
        attention={m: dict.fromkeys(names, maps) for m in ("transforms", "neighbours")},
        entropy={m: [0.9] * 12 for m in ("transforms", "neighbours")},
        sets=["k=4", "k=16", "k=64", "k=256"],
        label_free=[LabelFree(model=m, figure="finds its source", value=0.5, queries=9) for m in MODELS],
        clusterings=[clustering(4**i) for i in range(1, 5)],
        curves={m: [{"step": float(i), "loss": 1.0 / (i + 1)} for i in range(5000)] for m in MODELS},
        facts={"command": "grappa-dist run " + LONG},
    )


def test_a_page_of_a_hundred_tasks_and_thousands_of_classes_is_bounded(tmp_path: Path) -> None:
    html = render(large(100, 5000), tmp_path)
    assert "of 5,000 classes" in html
    assert "The other 94 tasks" in html
    assert len(html.encode()) < MOST_BYTES


def test_of_more_tasks_the_first_are_shown_and_the_page_does_not_grow_with_them(tmp_path: Path) -> None:
    html = render(large(1000, 2000), tmp_path)
    assert f"{1001 - MOST_COLUMNS} more tasks: metrics.json has all" in html
    assert len(html.encode()) < MOST_BYTES
