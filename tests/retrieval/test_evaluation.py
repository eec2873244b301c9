"""Scores of any model on labelled images: those of a run, those of pytorch-metric-learning, and what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import Store
from grappa_dist.data.shards import ImageShards
from grappa_dist.export import export_model, load_model
from grappa_dist.metrics import METRICS, retrieval_scores
from grappa_dist.models.spec import ModelSpec
from grappa_dist.retrieval.evaluation import evaluate
from grappa_dist.retrieval.images import open_images
from tests.retrieval.photos import EACH, embedder, model_in, write_photos
from tests.stages import tiny
from tests.stages.test_evaluate import evaluate_in, label_of, scores, task_of

OWN = "tests.models.tiny:create"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, object]]]]:
    """A model of a run that has evaluated it, and the scores that the run found."""
    root = tmp_path_factory.mktemp("run")
    settings, _, evaluation, _, _ = evaluate_in(root, label_of, task_of)
    store = Store(root)
    sets = tuple(tiny.random_adaptors(store, settings, seed) for seed in (1, 2))
    spec = ModelSpec("average", settings.backbone, settings.adapt.bottleneck, sets)
    export_model(spec, store.artifact("models/average", {}, spec.inputs))
    store.publish("model", store.artifact("models/average", {}, spec.inputs))
    return root, {model: scores(evaluation, model) for model in ("average", "backbone")}


def test_scores_are_those_of_the_run_on_the_same_shards(
    run: tuple[Path, dict[str, list[dict[str, object]]]],
) -> None:
    root, expected = run
    shards = [str(path) for path in sorted((root / "images").iterdir())]
    found = evaluate(root, shards, trust_modules=True, batch_size=8)
    assert list(found.scores) == ["average", "backbone"]
    for model, tasks in found.scores.items():
        plain = [{"task": s.task, **{m: getattr(s, m) for m in METRICS}, "queries": s.queries} for s in tasks]
        assert plain == expected[model]
        assert found.means[model].r_precision == pytest.approx(np.mean([s.r_precision for s in tasks]))
        assert all(s.low <= s.r_precision <= s.high for s in [*tasks, found.means[model]])
    mean, *each = found.gains
    assert [gain.task for gain in each] == [s.task for s in found.scores["average"]]
    assert mean.gain == pytest.approx(found.means["average"].r_precision - found.means["backbone"].r_precision)
    assert found.images == tiny.NUM_ROWS
    assert len(found.bad) == 1
    assert found.remarks == ["2 images without a label: neither query nor searched"]


@pytest.mark.slow
def test_scores_are_those_of_pytorch_metric_learning_with_copies_and_classes_of_one(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "alone").mkdir()
    (tmp_path / "photos" / "alone" / "a.png").write_bytes(tiny.picture(77))
    (tmp_path / "photos" / "cat" / "copy.png").write_bytes((tmp_path / "photos" / "cat" / "0.png").read_bytes())
    model = model_in(tmp_path / "run")
    found = evaluate(load_model(model), tmp_path / "photos", against=None)
    assert (found.gains, list(found.scores)) == ([], ["adapted"])
    (task,) = found.scores["adapted"]
    assert (task.task, task.queries, task.classes, task.alone) == ("photos", 3 * EACH + 1, 3, 1)
    run = embedder(model)
    images = open_images([str(tmp_path / "photos")], labelled=True)
    z = torch.from_numpy(run.embed(images).rows)
    names = [str((images.labels(row) or {})["label"]) for row in range(len(images))]
    labels = torch.tensor([sorted(set(names)).index(name) for name in names])
    calculator = AccuracyCalculator(
        include=("r_precision", "mean_average_precision_at_r", "precision_at_1"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(z, labels)
    assert task.r_precision == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert task.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert task.recall_at_1 == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert retrieval_scores(z, labels)["r_precision"] == task.r_precision


def test_a_bare_backbone_is_compared_with_another_model_or_with_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", bad=("cat/1.png",))
    small = ["backbone.image_size=32"]
    alone = evaluate(OWN, [tmp_path / "photos"], settings=small)
    assert (list(alone.scores), alone.gains) == (["backbone"], [])
    assert [name for name, _ in alone.bad] == ["cat/1.png"]
    both = evaluate(model_in(tmp_path / "run"), str(tmp_path / "photos"), against=OWN, settings=small)
    assert list(both.scores) == ["neighbours", OWN]  # which need not be the model's own
    assert both.scores[OWN] == alone.scores["backbone"]
    assert both.gains[0].baseline == pytest.approx(alone.means["backbone"].r_precision)
    same = evaluate(OWN, tmp_path / "photos", against=OWN, settings=small)
    assert list(same.scores) == [f"{OWN} (1)", f"{OWN} (2)"]
    assert same.gains[0].gain == 0
    assert same.gains[0].p_value == 1


@pytest.mark.parametrize(
    ("label", "column", "message"),
    [
        (
            lambda row: None,
            None,
            "none of 5 images has a label; expected class folders, or a CSV or shards with labels",
        ),
        (str, None, "no image has a label that another one shares, among 5 labelled images that can be read"),
        (lambda row: "one", "breed", "none of 5 images has a label under 'breed'; their JSON members have label"),
    ],
)
def test_where_there_is_nothing_to_find_it_is_said(
    label: object, column: str | None, message: str, tmp_path: Path
) -> None:
    paths = tiny.write_shards(tmp_path / "shards", (5,), bad=(), label=label)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        evaluate(OWN, paths, label_column=column)


def test_all_images_of_one_class_are_found_and_all_bad_ones_are_not(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "shards", (5,), bad=(), label=lambda row: "one")
    assert len(ImageShards.open(paths, None)) == 5
    assert evaluate(OWN, paths).means["backbone"].r_precision == 1
    bad = tiny.write_shards(tmp_path / "bad", (5,), bad=range(5), label=lambda row: "one")
    with pytest.raises(ValueError, match="among 0 labelled images that can be read"):
        evaluate(OWN, bad)
