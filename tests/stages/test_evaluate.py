from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.metrics import QueryScores, retrieval_scores
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import embed, feature_rows, features_of
from grappa_dist.stages.evaluate import (
    QUERIES_FILE,
    Evaluation,
    evaluate,
    insight_of,
    scores_of,
    task_queries,
)
from grappa_dist.stages.ground_truth import ground_truth_of, load_ground_truth
from grappa_dist.stages.insight import NEIGHBOURS
from tests.stages import tiny

ALONE = 39  # the last row is the one row of its task


def task_of(row: int) -> str:
    return "lonely" if row == ALONE else ("even", "odd")[row % 2]


def label_of(row: int) -> str | None:
    return None if row in (2, 3) else str(row % tiny.GROUPS)


def evaluate_in(
    root: Path, label: Callable[[int], str | None], task: Callable[[int], str | None], *, labelled: bool = True
) -> tuple[Config, ImageShards, Evaluation, np.ndarray, tiny.Here]:
    settings = tiny.config(tiny.write_shards(root / "images", label=label, task=task))
    images, here = ImageShards.open(settings.data.train, None), tiny.Here()
    run = tiny.run_in(settings, root, here)
    sets = tuple(tiny.random_adaptors(run.store, settings, seed) for seed in (1, 2))
    specs = {
        "backbone": ModelSpec("backbone", settings.backbone),
        "average": ModelSpec("average", settings.backbone, settings.adapt.bottleneck, sets),
    }
    features = {m: features_of(run.store, spec, settings.embed, images) for m, spec in specs.items()}
    for name, spec in specs.items():
        embed(run, images, spec, features[name])
    ground_truth = ground_truth_of(run.store, images, labelled=labelled)
    evaluation = Evaluation(
        ground_truth,
        {m: feature_rows(images, f) for m, f in features.items()},
        {m: scores_of(run.store, ground_truth, m, f) for m, f in features.items()},
        {m: insight_of(run.store, ground_truth, m, settings.evaluate, settings.seed, f) for m, f in features.items()},
    )
    bad = bad_rows(images, features["backbone"])
    here.asked.clear()
    evaluate(run, images, bad, specs, evaluation)
    assert here.asked == ["read_ground_truth", "evaluate"]
    evaluate(run, images, bad, specs, evaluation)
    assert len(here.asked) == 2  # nothing twice
    return settings, images, evaluation, bad, here


def scores(evaluation: Evaluation, model: str) -> list[dict[str, Any]]:
    return list(json.loads((evaluation.scores[model].path / "scores.json").read_text()))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate_in(tmp_path_factory.mktemp("labelled"), label_of, task_of)[2]


@pytest.mark.parametrize("model", ["backbone", "average"])
def test_scores_of_a_model_are_those_of_its_feature_arrays(labelled: Evaluation, model: str) -> None:
    found = {row.pop("task"): row for row in scores(labelled, model)}
    assert set(found) == {"even", "odd"}
    for number, task in enumerate(("even", "odd")):
        rows = [r for r in range(tiny.NUM_ROWS - 1) if r % 2 == number and r != tiny.BAD and label_of(r) is not None]
        z = torch.from_numpy(labelled.features[model].take(np.array(rows)))
        assert found[task] == retrieval_scores(z, torch.tensor([int(str(label_of(r))) for r in rows]))
        assert found[task]["queries"] == len(rows)


@pytest.mark.parametrize("model", ["backbone", "average"])
def test_the_scores_of_each_query_are_kept_and_add_up_to_the_scores(labelled: Evaluation, model: str) -> None:
    tasks = task_queries(labelled.ground_truth, labelled.scores)
    kept = np.load(labelled.scores[model].path / QUERIES_FILE)
    assert [task.task for task in tasks] == ["even", "odd"]
    for number, (task, row) in enumerate(zip(tasks, scores(labelled, model), strict=True)):
        rows = [r for r in range(tiny.NUM_ROWS - 1) if r % 2 == number and r != tiny.BAD and label_of(r) is not None]
        mine = kept[kept[:, 0] % 2 == number]
        assert mine[:, 0].tolist() == rows
        assert task.classes.tolist() == load_ground_truth(labelled.ground_truth).labels[rows].tolist()
        assert QueryScores(mine[:, 0], mine[:, 1:]).sums().finish() == {k: v for k, v in row.items() if k != "task"}
        assert task.r_precision[model].tolist() == (mine[:, 1] / 2**40).tolist()


def test_a_task_of_single_images_has_no_row_of_scores(tmp_path: Path) -> None:
    *_, evaluation, _, _ = evaluate_in(tmp_path, str, lambda row: "singles")
    assert scores(evaluation, "backbone") == task_queries(evaluation.ground_truth, evaluation.scores) == []
    assert len(set(load_ground_truth(evaluation.ground_truth).labels.tolist())) == tiny.NUM_ROWS


def test_images_without_labels_have_no_scores_but_insight(tmp_path: Path) -> None:
    *_, evaluation, bad, _ = evaluate_in(tmp_path, lambda row: None, lambda row: None)
    assert scores(evaluation, "average") == []
    ground_truth = load_ground_truth(evaluation.ground_truth)
    assert ground_truth.task_names == ["all"]
    assert set(ground_truth.labels.tolist()) == {-1}
    insight = json.loads((evaluation.insights["average"].path / "insight.json").read_text())
    assert 0 <= insight["view_finds_source"] <= 1
    assert insight["view_queries"] == 6
    assert "neighbours_share_label" not in insight
    shown = {g["query"] for g in insight["galleries"]} | {h["row"] for g in insight["galleries"] for h in g["hits"]}
    assert not shown & set(bad.tolist())


def test_labels_of_training_images_are_never_read(tmp_path: Path) -> None:
    *_, evaluation, _, _ = evaluate_in(tmp_path, label_of, task_of, labelled=False)
    assert scores(evaluation, "backbone") == []
    assert load_ground_truth(evaluation.ground_truth).task_names == ["all"]


def test_galleries_show_the_nearest_rows_of_the_task_without_the_query(labelled: Evaluation) -> None:
    ground_truth = load_ground_truth(labelled.ground_truth)
    insight = json.loads((labelled.insights["backbone"].path / "insight.json").read_text())
    by_task = {ground_truth.task_names[g["task"]]: g for g in insight["galleries"]}
    assert by_task["lonely"]["hits"] == []
    query, hits = by_task["even"]["query"], by_task["even"]["hits"]
    rows = np.array([r for r in range(0, tiny.NUM_ROWS, 2) if r not in (query, tiny.BAD)])
    cosines = labelled.features["backbone"].take(rows) @ labelled.features["backbone"].take(np.array([query]))[0]
    assert [hit["row"] for hit in hits] == rows[np.argsort(-cosines)[:2]].tolist()


def test_insight_of_every_model_is_from_the_same_images(labelled: Evaluation) -> None:
    queries = [
        [g["query"] for g in json.loads((a.path / "insight.json").read_text())["galleries"]]
        for a in labelled.insights.values()
    ]
    assert queries[0] == queries[1]


def test_neighbours_among_labelled_images_are_counted_by_shared_task_and_label(labelled: Evaluation) -> None:
    ground_truth = load_ground_truth(labelled.ground_truth)
    insight = json.loads((labelled.insights["backbone"].path / "insight.json").read_text())
    rows = np.delete(np.arange(tiny.NUM_ROWS), tiny.BAD)
    cosines = (lambda z: z.astype(np.float64) @ z.T)(labelled.features["backbone"].take(rows))
    np.fill_diagonal(cosines, -np.inf)
    near = rows[np.argsort(-cosines, kind="stable")[:, :NEIGHBOURS]]
    same_task = ground_truth.tasks[near] == ground_truth.tasks[rows, None]
    same_label = (ground_truth.labels[near] == ground_truth.labels[rows, None])[ground_truth.labels[rows] >= 0]
    assert insight["neighbours_share_task"] == pytest.approx(same_task.mean())
    assert insight["neighbours_share_label"] == pytest.approx(same_label.mean())
    assert insight["neighbour_queries"] == len(rows)
