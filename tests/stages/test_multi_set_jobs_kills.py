"""Kills while a job of several sets saves them: the next run of the stage loses nothing and leaves nothing behind."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, rows_file
from grappa_dist.console import METRICS_FILE, read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages import multi_set_jobs
from grappa_dist.stages.adapt import adapt, adaptors_of
from tests.processes import run_ranks
from tests.stages import tiny

KS = (3, 4)
SETTINGS = {"epochs": 1, "sets_per_job": 2, "checkpoint_steps": 2, "classifier": "random"}


@dataclass
class Killing(tiny.Here):
    """Runs jobs that die at the n-th call of something, and dies with them."""

    at: tuple[str, int] = ("", 0)

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        for job in jobs:
            run_ranks(dies, 1, job, *self.at, timeout_s=400)
        raise tiny.Killed


def dies(comm: Comm, job: Job, name: str, call: int) -> None:
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise tiny.Killed
            return real(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        if name == "save":
            patch.setattr(multi_set_jobs, "save_tensors", dying(multi_set_jobs.save_tensors))
        elif name == "commit":
            patch.setattr(Artifact, "commit", dying(Artifact.commit))
        else:
            patch.setattr(multi_set_jobs, "shutil", types.SimpleNamespace(rmtree=dying(lambda *args: None)))
        with pytest.raises(tiny.Killed):
            job.function(tiny.Watcher().context(comm), job.spec)


def adapt_in(root: Path, here: tiny.Here, where: Mapping[str, Any] = {}, **settings: Any) -> dict[int, Artifact]:
    """The stage on the shards next to `root`."""
    paths = [str(path) for path in sorted((root.parent / "images").iterdir())]
    config = tiny.config(paths, adapt={**SETTINGS, **settings}, resources=where)
    run_of, images = tiny.run_in(config, root, here), ImageShards.open(paths, None)
    labels, adaptors = dict[int, Artifact](), dict[int, Artifact]()
    for k in KS:
        labels[k] = run_of.store.artifact(f"labels/k={k}", {}, {})
        if not labels[k].complete:
            for shard, path in enumerate(tiny.labels_in(root / f"rows-{k}", images, k).paths):
                np.save(labels[k].begin() / rows_file(shard), np.load(path))
            labels[k].commit()
        adaptors[k] = adaptors_of(run_of.store, config.backbone, config.adapt, config.data, 0, labels[k])
    adapt(run_of, adaptors, labels, images, np.array([tiny.BAD]))
    return adaptors


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Artifact]:
    folder = tmp_path_factory.mktemp("multi-set-kills")
    tiny.write_shards(folder / "images")
    return adapt_in(folder / "straight", tiny.Here(num_workers=1))


@pytest.mark.parametrize(
    ("at", "asked", "begins"),
    [
        (("save", 2), ["k=3+k=4"], [0, 2]),
        (("commit", 2), [], [0]),
        (("remove", 1), [], [0]),
    ],
)
def test_a_kill_while_a_multi_set_job_is_saved_loses_no_step_and_leaves_no_folder(
    straight: dict[int, Artifact], at: tuple[str, int], asked: list[str], begins: list[int]
) -> None:
    root, here = straight[3].root.parent / f"killed-{at[0]}", tiny.Here(num_workers=1)
    with pytest.raises(tiny.Killed):
        adapt_in(root, Killing(num_workers=1, at=at))
    for k, artifact in adapt_in(root, here, sets_per_job=1).items():
        assert (artifact.path / ADAPTORS_FILE).read_bytes() == (straight[k].path / ADAPTORS_FILE).read_bytes()
        events = read_events(artifact.path / METRICS_FILE)
        assert [event["at_step"] for event in events if event["name"] == "begins"] == begins
    assert here.asked == asked
    assert list((root / "packs").iterdir()) == []
    assert not list(root.glob("**/*.partial"))


def test_a_multi_set_job_whose_sets_go_on_in_other_jobs_leaves_no_folder(straight: dict[int, Artifact]) -> None:
    root, here = straight[3].root.parent / "other-jobs", tiny.Here(num_workers=1)
    with pytest.raises(tiny.Killed):  # before any checkpoint, so that its sets are free to go elsewhere
        adapt_in(root, Killing(num_workers=1, at=("save", 2)), checkpoint_steps=100)
    assert len(list((root / "packs").iterdir())) == 1
    adaptors = adapt_in(root, here, sets_per_job=1, checkpoint_steps=100)
    assert here.asked == ["k=4"]  # the other one was saved whole
    assert all(artifact.complete for artifact in adaptors.values())
    assert list((root / "packs").iterdir()) == []


def test_auto_counts_only_sets_that_have_not_begun(straight: dict[int, Artifact]) -> None:
    root, here = straight[3].root.parent / "auto", tiny.Here(num_workers=1)
    with pytest.raises(tiny.Killed):
        adapt_in(root, Killing(num_workers=1, at=("save", 1)))
    adapt_in(root, here, sets_per_job="auto")
    assert here.asked == ["k=3+k=4"]  # and no rates are measured for nothing


def test_with_elastic_fewer_workers_than_ranks_train_all_sets(
    straight: dict[int, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    here, where = tiny.Here(num_workers=1), {"adapt_ranks": 2, "elastic": True}
    adaptors = adapt_in(straight[3].root.parent / "elastic", here, where, sets_per_job="auto")
    assert all(artifact.complete for artifact in adaptors.values())
    output = capsys.readouterr().err
    assert ", 1 job at a time" in output
    assert "of 1 rank, " in output
