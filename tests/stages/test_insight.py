"""Evaluation by ranks: the figures of one process, on uneven parts and an empty one; every image decoded once."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import Store
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import Stopped
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages import insight
from grappa_dist.stages.embed import embed, feature_rows, features_of
from grappa_dist.stages.evaluate import EvaluateJob, ModelTask, evaluate_models, insight_of, scores_of
from grappa_dist.stages.ground_truth import ground_truth_of, read_ground_truth
from grappa_dist.stages.insight import spread_over_classes
from tests.processes import run_ranks
from tests.stages import tiny


def label_of(row: int) -> str | None:
    return None if row in (2, 3) else str(row % tiny.GROUPS)


def job_in(folder: Path) -> EvaluateJob:
    """The evaluation of two models on images of two tasks, with nothing but features and labels done."""
    settings = tiny.config(tiny.write_shards(folder / "images", label=label_of, task=lambda row: str(row % 2)))
    images, store = ImageShards.open(settings.data.train, None), Store(folder)
    run = tiny.run_in(settings, folder, tiny.Here())
    sets = tuple(tiny.random_adaptors(store, settings, seed) for seed in (1, 2))
    specs = {
        "backbone": ModelSpec("backbone", settings.backbone),
        "average": ModelSpec("average", settings.backbone, settings.adapt.bottleneck, sets),
    }
    known = ground_truth_of(store, images, labelled=True)
    read_ground_truth(tiny.CPU, (images, known))
    models = []
    for name, spec in specs.items():
        features = features_of(store, spec, settings.embed, images)
        embed(run, images, spec, features)
        figures = insight_of(store, known, name, settings.evaluate, settings.seed, features)
        models.append(ModelTask(spec, feature_rows(images, features), scores_of(store, known, name, features), figures))
    return EvaluateJob(images, np.array([tiny.BAD]), known, tuple(models), settings)


def elsewhere(job: EvaluateJob, root: Path) -> EvaluateJob:
    """The same job whose artefacts are written below another folder."""
    models = [
        replace(m, scores=replace(m.scores, root=root), insight=replace(m.insight, root=root)) for m in job.models
    ]
    return replace(job, models=tuple(models))


def made_by(job: EvaluateJob) -> dict[str, bytes]:
    """The bytes of all that was computed."""
    files = [
        *(m.scores.path / name for m in job.models for name in ("scores.json", "queries.npy")),
        *(m.insight.path / "insight.json" for m in job.models),
    ]
    return {f"{file.parent.name} {file.name}": file.read_bytes() for file in files}


def evaluate_on(comm: Comm, job: EvaluateJob) -> None:
    evaluate_models(tiny.Watcher().context(comm), job)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    return job_in(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def alone(job: EvaluateJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of it."""
    there = elsewhere(job, tmp_path_factory.mktemp("alone"))
    evaluate_on(Comm(), there)
    return made_by(there)


@pytest.mark.parametrize(("ranks", "held_bytes"), [(2, 0), (3, 2**28)])
def test_any_number_of_ranks_has_the_bytes_of_one_process_whether_rows_are_held_or_read_by_tiles(
    job: EvaluateJob, alone: dict[str, bytes], ranks: int, held_bytes: int, tmp_path: Path
) -> None:
    there = elsewhere(replace(job, held_bytes=held_bytes), tmp_path)
    run_ranks(evaluate_on, ranks, there)
    assert made_by(there) == alone
    assert len(json.loads(alone[next(name for name in alone if name.endswith("scores.json"))])) == 2


def test_a_rank_without_queries_takes_part(job: EvaluateJob, tmp_path: Path) -> None:
    few = np.setdiff1d(np.arange(len(job.images)), [0, 10, 20, 1, 5])  # three images of one class, two of none
    some = replace(job, bad=few, models=job.models[:1])
    one, several = elsewhere(some, tmp_path / "one"), elsewhere(some, tmp_path / "several")
    evaluate_on(Comm(), one)
    run_ranks(evaluate_on, 4, several)
    assert made_by(one) == made_by(several)
    (scores,) = json.loads((one.models[0].scores.path / "scores.json").read_text())
    assert (scores["task"], scores["queries"], scores["r_precision"]) == ("0", 3, 1.0)


def test_images_are_decoded_once_for_all_models(
    job: EvaluateJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded, read = Counter[int](), insight.load_images

    def counting(images: Any, rows: Any, *args: Any, **more: Any) -> Any:
        decoded.update(np.asarray(rows).tolist())
        return read(images, rows, *args, **more)

    monkeypatch.setattr(insight, "load_images", counting)
    there = elsewhere(job, tmp_path)
    evaluate_on(Comm(), there)
    assert len(there.models) == 2
    assert len(decoded) == job.config.evaluate.view_queries
    assert set(decoded.values()) == {1}


def test_a_full_disk_is_an_error_before_any_image_is_decoded_into_it(
    job: EvaluateJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"bytes of scratch: No space left .*TMPDIR names another"):
        evaluate_on(Comm(), elsewhere(job, tmp_path))


def test_what_is_committed_stays_after_a_kill_and_the_rest_is_made_with_the_same_bytes(
    job: EvaluateJob, alone: dict[str, bytes], tmp_path: Path
) -> None:
    there = elsewhere(job, tmp_path)
    with pytest.raises(tiny.Killed):
        evaluate_models(tiny.Watcher(kill_after=1).context(Comm()), there)
    first, second = there.models
    assert (first.scores.complete, first.insight.complete) == (True, True)
    assert not second.scores.complete
    before = tiny.files_below(first.scores.path)
    evaluate_on(Comm(), there)
    assert tiny.files_below(first.scores.path) == before
    assert made_by(there) == alone


def test_a_stop_is_heeded_between_two_tiles_and_keeps_what_is_done(job: EvaluateJob, tmp_path: Path) -> None:
    there, watcher = elsewhere(job, tmp_path), tiny.Watcher(stop_after=1)
    with pytest.raises(Stopped):
        evaluate_models(watcher.context(Comm()), there)
    assert [m.scores.complete for m in there.models] == [True, False]
    assert {"done": 1, "of": 2, "unit": "models"} in watcher.statuses


@pytest.mark.parametrize(
    ("labels", "count", "expected"),
    [
        ([5, 5, 5, 7, 7, 9, 9], 3, [0, 3, 5]),
        ([5, 5, 5, 7, 7], 4, [0, 3, 1, 4]),
        ([5, 6, -1, 7, 7], 2, [3, 4]),  # 5 and 6 are alone in their class
        ([5, 6, -1, 7, 7], 9, [3, 4, 0, 1, 2]),
        ([5], 0, []),
    ],
)
def test_queries_of_galleries_are_of_as_many_classes_as_possible(
    labels: list[int], count: int, expected: list[int]
) -> None:
    assert spread_over_classes(np.array(labels), count).tolist() == expected
