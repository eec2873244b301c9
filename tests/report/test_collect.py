from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.checksums import forget
from grappa_dist.console import Events
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.files import write_json
from grappa_dist.layout import lay_out
from grappa_dist.report.collect import (
    _bad,
    best_sets,
    by_step,
    curve,
    describe_bad_images,
    job_of,
    list_bad_images,
    median,
    neighbour_figures,
    score_rows,
    steps_of,
)
from grappa_dist.report.facts import Steps, graph_facts, waiting_facts
from grappa_dist.report.page import MOST_BAD_ROWS
from grappa_dist.stages.flow import Flow
from tests.data.written import write_tar
from tests.stages import tiny

FIGURES = ("r_precision", "map_at_r", "recall_at_1")


def row(task: str, value: float, queries: int = 7) -> dict[str, Any]:
    return {"task": task, "queries": queries, **dict.fromkeys(FIGURES, value)}


def scored(root: Path, scores: Mapping[str, list[dict[str, Any]]]) -> Flow:
    """A flow of which nothing exists but the scores."""
    sections: dict[str, Any] = {"clustering": {"num_labels": (4, 8)}, "fuse": {"variants": ("average", "neighbours")}}
    settings = tiny.config(tiny.write_shards(root / "images"), **sections)
    flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)
    for model, artifact in flow.scores.items():
        (artifact.begin() / "scores.json").write_text(json.dumps(scores.get(model, [])))
        artifact.commit()
    return flow


SCORES = {
    "backbone": [row("kinds", 0.2), row("species", 0.5)],
    "k=4": [row("kinds", 0.6), row("species", 0.1)],
    "k=8": [row("kinds", 0.3), row("species", 0.4)],
    "average": [row("kinds", 0.7), row("species", 0.6)],
    "neighbours": [row("kinds", 0.8), row("species", 0.7)],
}


def test_rows_of_the_table_are_in_the_order_of_the_method_with_the_oracle_after_the_sets(tmp_path: Path) -> None:
    rows = score_rows(scored(tmp_path, SCORES))
    models = ["backbone", "k=4", "k=8", "oracle", "average", "neighbours"]
    assert [(r["model"], r["task"]) for r in rows] == [(m, t) for m in models for t in ("kinds", "species")]
    assert all(list(r) == ["model", "task", "queries", *FIGURES] for r in rows)
    assert {(r["model"], r["task"]): r["map_at_r"] for r in rows}["neighbours", "species"] == 0.7


def test_the_oracle_takes_the_best_set_of_every_task(tmp_path: Path) -> None:
    oracle = {r["task"]: r["r_precision"] for r in score_rows(scored(tmp_path, SCORES)) if r["model"] == "oracle"}
    assert oracle == {"kinds": 0.6, "species": 0.4}


def test_a_tie_goes_to_the_smaller_set() -> None:
    sets = [{"model": f"k={k}", **row("kinds", 0.5, queries=k)} for k in (4, 8)]
    assert [best["queries"] for best in best_sets(sets)] == [4]  # type: ignore[arg-type]


def test_without_scores_there_are_no_rows_and_no_oracle(tmp_path: Path) -> None:
    assert score_rows(scored(tmp_path, {})) == []


@pytest.mark.parametrize("change", ["notes", "name"])
def test_a_report_is_named_by_what_it_shows(tmp_path: Path, change: str) -> None:
    flow = scored(tmp_path, SCORES)
    settings = tiny.config([str(path) for path in sorted((tmp_path / "images").iterdir())])
    other = settings.model_copy(update={change: ("a note",) if change == "notes" else "other"})
    images = flow.train
    names = {lay_out(c, Store(tmp_path), images, None).report.name for c in (settings, settings, other)}
    assert len(names) == 2


def test_a_graph_that_fell_back_to_an_exact_search_is_reported_so_in_place_of_a_recall(tmp_path: Path) -> None:
    flow, about = scored(tmp_path, SCORES), "neighbours of neighbours were searched"
    common = {
        "graph": "approximate",
        "probes": 3,
        "lists": 9,
        "duplicate_cosine": 0.9,
        "rows_with_duplicates_share": 0.1,
    }
    lists = {"searched": "lists", "recall": 0.93, "recall_error": 0.005, "recall_rows": 512}
    exact = {"searched": "exact", "recall": 1.0, "recall_error": 0.0, "recall_rows": 0}
    expected = ["through 3 of 9 lists, recall 0.9300 ± 0.0050", "exactly: lists did not reach fuse.recall_floor"]

    def make(found: dict[int, dict[str, Any]]) -> None:
        shutil.rmtree(flow.fusions["neighbours"].path, ignore_errors=True)
        folder = flow.fusions["neighbours"].begin()
        for epoch, figures in found.items():
            of_graph = {**common, **figures, "neighbours_share_pseudo_label": {}}
            write_json(folder / f"knn/epoch-{epoch}/statistics.json", of_graph)
        flow.fusions["neighbours"].commit()
        forget()

    for epoch, found in enumerate(({0: lists}, {0: lists, 1: exact})):
        make(found)
        shown = [f["value"] for f in neighbour_figures(flow.fusions, 40) if f["figure"].startswith("true neighbours")]
        assert shown == ([0.93] if epoch == 0 else [])
    assert dict(graph_facts(flow.fusions)) == {about: f"epoch 1 {expected[0]}; epoch 2 {expected[1]}"}
    make({1: exact})
    assert dict(graph_facts(flow.fusions)) == {about: expected[1]}


def test_entropy_and_decay_are_read_from_the_log_by_layer_and_unknown_ratios_are_left_out(tmp_path: Path) -> None:
    artifact = scored(tmp_path, SCORES).fusions["neighbours"]
    events = Events(artifact.begin() / "metrics.jsonl", job="neighbours")
    for step, ratio in enumerate((1.0, 9.0, 2.0)):
        layers = {"decay_to_gradient.0": math.nan, "decay_to_gradient.1": ratio, "entropy.0": 1.0, "entropy.1": 0.5}
        events("step", step=step, loss=3.0, **layers)
    events.close()
    artifact.commit()
    steps = steps_of(artifact)
    by_layer = list(zip(*by_step(steps, "decay_to_gradient"), strict=True))
    assert [median(layer) for layer in by_layer] == pytest.approx([math.nan, 2.0], nan_ok=True)
    assert by_step(steps, "entropy") == [[1.0, 0.5]] * 3
    assert [(p["decay_to_gradient"], p["entropy"]) for p in curve(steps)] == [(1.0, 0.75), (9.0, 0.75), (2.0, 0.75)]


def logs(flow: Flow) -> dict[str, Steps]:
    return {job_of(artifact): steps_of(artifact) for artifact in flow.adaptors.values() if artifact.complete}


def test_the_share_of_time_that_jobs_waited_for_data_is_shown_if_they_logged_it(tmp_path: Path) -> None:
    flow = scored(tmp_path, SCORES)
    assert waiting_facts(logs(flow)) == {}
    for artifact, shares in zip(flow.adaptors.values(), ((0.0, 0.1, 0.2), (0.5,)), strict=True):
        events = Events(artifact.begin() / "metrics.jsonl")
        events("begins", at_step=0)
        for step, share in enumerate(shares):
            events("step", step=step, loss=1.0, data_wait_share=share)
        events.close()
        artifact.commit()
    assert waiting_facts(logs(flow)) == {"waiting for data": "k=4 10.0%, k=8 50.0%"}


def test_the_bad_images_that_are_listed_have_the_names_of_their_files(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images") as writer:
        for number in range(MOST_BAD_ROWS + 5):
            writer.write(b"no image", "jpg", name=f"photos/{number}.jpg" if number != 2 else None)
    images = ImageShards.open([tmp_path / "images"], None)
    features = Store(tmp_path).artifact("features", {}, {})
    write_json(features.begin() / "bad.json", {str(row): "why" for row in range(len(images))})
    features.commit()
    *listed, others = _bad(images, [features])
    names = [f"photos/{number}.jpg" if number != 2 else "" for number in range(MOST_BAD_ROWS)]
    assert [(row["key"], row["file"]) for row in listed] == [(f"{row:09d}", name) for row, name in enumerate(names)]
    assert others == {"shard": "", "key": "", "reason": "why", "images": 5}  # whose keys are not read


def test_the_line_on_bad_images_counts_those_without_a_row_and_names_the_place_of_the_list(tmp_path: Path) -> None:
    misnamed = {f"IMG.{number}.jpg": b"no image" for number in range(3)}
    write_tar(tmp_path / "images" / "a.tar", {**{f"{row}.jpg": b"no image" for row in range(120)}, **misnamed})
    write_tar(tmp_path / "whole" / "b.tar", {f"{row}.jpg": b"no image" for row in range(120)})
    for folder, bad, counts, rest in (
        ("images", 0, "3 of 123 training images (about 3 have no row)", "those that have a row, with reasons"),
        ("images", 120, "123 of 123 training images (about 3 have no row)", "those that have a row, with reasons"),
        ("whole", 100, "100 of 120 training images", "them with reasons"),
        ("whole", 101, "101 of 120 training images", "them with reasons"),
    ):
        settings = tiny.config([str(tmp_path / folder)])
        root = tmp_path / f"{folder}-{bad}"
        flow = lay_out(settings, Store(root), ImageShards.open(settings.data.train, None), None)
        for artifact in flow.features:
            write_json(artifact.begin() / "bad.json", {str(row): "why" for row in range(bad)})
            artifact.commit()
        said = f"left out: {counts} could not be used; features/backbone/*/bad.json list {rest}"
        assert describe_bad_images(flow) == said
        path = root / "bad_images.csv"
        assert list_bad_images(flow, path) == f"left out  {counts} could not be used: named, with reasons, in {path}"
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
        assert len(lines) == 1 + int(counts.split()[0])
