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


def test_a_query_does_not_find_its_own_bytes_and_one_without_its_class_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grappa_dist.retrieval.evaluation.SHOWN", 12)
    write_photos(tmp_path / "shop")
    (tmp_path / "asked" / "cat").mkdir(parents=True)
    (tmp_path / "asked" / "dog").mkdir()
    (tmp_path / "asked" / "cat" / "renamed.png").write_bytes((tmp_path / "shop" / "cat" / "2.png").read_bytes())
    (tmp_path / "asked" / "cat" / "new.png").write_bytes(tiny.picture(98))
    (tmp_path / "asked" / "dog" / "a.png").write_bytes(tiny.picture(99))
    found = evaluate(OWN, queries=tmp_path / "asked", gallery=tmp_path / "shop")
    assert found.unmatched == [("dog/a.png", "shop", "dog")]
    assert (found.searched.queries, found.searched.gallery) == (3, 3 * EACH)
    (task,) = found.scores["backbone"]
    assert (task.task, task.queries, task.alone) == ("shop", 2, 1)
    assert found.queries is not None
    assert found.lookup is not None
    ids = found.queries.rankings["backbone"].ids.tolist()
    names = {found.lookup.name(row): found_ids for row, found_ids in zip(found.queries.rows, ids, strict=True)}
    own = 3 + 2 * EACH + 2  # three queries, then the images of two classes
    assert found.lookup.name(own) == "cat/2.png"
    assert own not in names["cat/renamed.png"]
    assert own in names["cat/new.png"]
    for path in (tmp_path / "asked" / "cat").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="none of 1 query has an image of its class in the gallery of 12 images"):
        evaluate(OWN, queries=tmp_path / "asked", gallery=tmp_path / "shop")


def test_distractors_are_searched_lower_the_scores_and_leave_out_copies_of_labelled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grappa_dist.retrieval.evaluation.BLOCK", 4)
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "none.png").write_bytes(b"no image")
    alone = evaluate(OWN, tmp_path / "photos")
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    for number in range(9):
        (crawl / f"{number}.png").write_bytes(tiny.picture(number + 50))
    (crawl / "bad.png").write_bytes(b"no image")
    (crawl / "copy.png").write_bytes((tmp_path / "photos" / "cat" / "0.png").read_bytes())
    found = evaluate(OWN, tmp_path / "photos", distractors=crawl, batch_size=3)
    assert (found.searched.distractors, found.searched.copies, found.images) == (9, 1, 13 + 11)
    assert [name for name, _ in found.bad] == ["cat/none.png", "bad.png"]  # the same bytes, and counted as bad alone
    assert found.queries is not None
    assert found.lookup is not None
    hits = {hit for hit in found.queries.rankings["backbone"].ids.flatten().tolist() if hit >= 13}
    assert hits
    assert {found.lookup.label(hit) for hit in hits} == {None}
    assert "copy.png" not in {found.lookup.name(hit) for hit in hits}
    before, after = alone.means["backbone"].figures, found.means["backbone"].figures
    assert all(after[metric].value <= before[metric].value for metric in before)
    assert after["r_precision"].value < before["r_precision"].value


def test_a_gallery_of_all_tasks_is_scored_beside_that_of_each(
    run: tuple[Path, dict[str, list[dict[str, object]]]], tmp_path: Path
) -> None:
    root, _ = run
    found = evaluate(root, sorted((root / "images").iterdir()), trust_modules=True)
    assert found.mixed is not None
    for model, tasks in found.scores.items():
        mixed = found.mixed.scores[model]
        assert [s.task for s in mixed] == [s.task for s in tasks]
        assert all(
            m.figures[name].value <= s.figures[name].value
            for m, s in zip(mixed, tasks, strict=True)
            for name in m.figures
        )
    assert found.mixed.means["average"].r_precision < found.means["average"].r_precision
    assert len(found.mixed.gains) == len(found.gains)
    write_photos(tmp_path / "photos")
    assert evaluate(OWN, tmp_path / "photos").mixed is None


def test_a_model_that_weighs_its_sets_for_each_task_is_searched_by_task_alone(tmp_path: Path) -> None:
    for task in ("photos", "others"):
        write_photos(tmp_path / task)
    model = load_model(model_in(tmp_path / "run"))
    model.galleries = {"photos": torch.eye(len(model.sets))[0]}
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    (crawl / "0.png").write_bytes(tiny.picture(50))
    found = evaluate(model, [tmp_path / "photos", tmp_path / "others"], distractors=crawl, against=None)
    assert found.mixed is None
    assert any("has weights for each task" in line for line in found.remarks)
    model.weigh(None)
    model.galleries = {}
    plain = evaluate(model, tmp_path / "others", distractors=crawl, against=None)
    assert found.scores["adapted"][1].figures == plain.scores["adapted"][0].figures  # the run found no weights for it
