"""Which sets share a job, and how many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import rows_file
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.placement import Rates
from grappa_dist.stages.adapt import LEAST_IMAGES, Measured, _most_sets, adapt, adaptors_of
from grappa_dist.training.memory import MemoryBudget
from tests.stages import tiny
from tests.stages.multi_set import KS, job_in


@pytest.mark.parametrize(("asked", "names"), [(1, ["k=3", "k=5"]), (2, ["k=3+k=5"]), ("auto", ["k=3+k=5"])])
def test_only_missing_sets_are_trained_in_jobs_of_the_size_asked_for(
    drawn: Path, tmp_path: Path, asked: int | str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in sorted((drawn / "images").iterdir())]
    settings = tiny.config(paths, adapt={"epochs": 1, "sets_per_job": asked, "classifier": "random"})
    here = tiny.Here(num_workers=1)
    run_of = tiny.run_in(settings, tmp_path, here)
    images, labels, adaptors = ImageShards.open(paths, None), {}, {}
    for k in KS:
        labels[k] = run_of.store.artifact(f"labels/k={k}", {}, {})
        for shard, path in enumerate(tiny.labels_in(tmp_path / f"rows-{k}", images, k).paths):
            np.save(labels[k].begin() / rows_file(shard), np.load(path))
        labels[k].commit()
        adaptors[k] = adaptors_of(run_of.store, settings.backbone, settings.adapt, settings.data, 0, labels[k])
    adaptors[4].begin()
    adaptors[4].commit()
    adapt(run_of, adaptors, labels, images, np.array([tiny.BAD]))
    assert [name for name in here.asked if name != "measure_rates"] == names
    assert all(artifact.complete for artifact in adaptors.values())
    output = capsys.readouterr().err
    assert ("2 sets to a job: an image takes" in output) == (asked == "auto")
    assert f"{len(names)} job" in output


def test_how_many_sets_memory_holds_follows_from_the_images_at_a_time_and_the_classes(drawn: Path) -> None:
    job = job_in(drawn, "names")
    job = replace(job, training=replace(job.training, data=job.training.data.model_copy(update={"streams": 16})))
    found = Measured(Rates(1.0, 0.1, 0.5, overlap=False), MemoryBudget(2_000, 100), channels=10)

    def most(ranks: int, **settings: Any) -> int:
        return _most_sets(replace(job, adapt=job.adapt.model_copy(update=settings)), found, ranks)

    assert most(1) == 1  # 16 images of one set are 1600 bytes
    assert most(2) == 3  # 3 of three, of which together about as many go at a time as of one: 900, and their rows 720
    assert most(4) == 3
    assert most(2, micro_batch=8) == 1  # 8 of two are 1600 too, and a rank's rows of their 5 + 4 classes 540
    assert most(1, micro_batch=2) == 2
    assert most(1, micro_batch="auto") == most(1, micro_batch=LEAST_IMAGES) == 1
    assert most(4, micro_batch="auto") == 3
