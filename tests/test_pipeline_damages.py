"""Finished runs in which files are damaged: noticed, set aside, made anew with the same bytes, and told."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from grappa_dist import pipeline
from grappa_dist.artifacts import Artifact, NotSeen, Store, look_at
from grappa_dist.checksums import MANIFEST, DamagedArtifact
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.layout import lay_out
from grappa_dist.stages.damages import DAMAGES_FILE, Mending, read_damages
from grappa_dist.stages.flow import artifacts_of
from tests.stages import tiny
from tests.test_artifacts import flip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    shards = tiny.write_shards(tmp_path_factory.mktemp("images"), label=lambda row: f"{row % 4}")
    test = tiny.write_shards(tmp_path_factory.mktemp("test"), (9,), bad=(), label=lambda row: f"{row % 3}", seed=1)
    data = {"train": shards, "test": test, "streams": 4, "max_bad_share": 0.05}
    settings = tiny.config(shards, data=data, adapt={"epochs": 1}, fuse={"variants": ("average",)})
    root = tmp_path_factory.mktemp("run")
    pipeline.run_in(tiny.run_in(settings, root, tiny.Here()))
    return root, settings


@pytest.fixture
def damaged_run(finished: tuple[Path, Config], tmp_path: Path) -> tuple[Path, Config]:
    return shutil.copytree(finished[0], tmp_path / "run", symlinks=True), finished[1]


def artifacts_in(root: Path, settings: Config) -> list[Artifact]:
    train, test = (ImageShards.open(paths, None) for paths in (settings.data.train, settings.data.test))
    return artifacts_of(lay_out(settings, Store(root), train, test))


def one(root: Path, pattern: str) -> Path:
    return sorted(path for path in root.glob(pattern) if ".damaged" not in str(path))[0]


def zero_a_quarter(path: Path) -> None:
    rows = np.load(path, mmap_mode="r+")
    rows[: max(1, len(rows) // 4)] = 0
    rows.flush()


def change_labels(path: Path, to: int = 1) -> None:
    labels = np.load(path, mmap_mode="r+")
    labels[3] = (labels[3] + 1) % 4 if to == 1 else to
    labels.flush()


def flip_an_exponent(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] *= 2.0**32
    save_file(tensors, path)


def swap(path: Path) -> None:
    other = one(path.parents[1], f"*/{path.name}")
    assert other != path
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def swap_folders(path: Path) -> None:
    other = one(path.parents[1], f"*/{path.name}")
    path.parent.rename(path.parents[1] / "x")
    other.parent.rename(path.parent)
    (path.parents[1] / "x").rename(other.parent)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "features zeroed": ("features/backbone/part2*/rows.npy", zero_a_quarter),
    "labels changed": ("labels/k=4-*/rows-000000.npy", change_labels),
    "labels beyond K": ("labels/k=6-*/rows-000000.npy", lambda path: change_labels(path, 6)),
    "an exponent in adaptors": ("adaptors/k=4-*/adaptors.safetensors", flip_an_exponent),
    "adaptors swapped": ("adaptors/k=6-*/adaptors.safetensors", swap),
    "adaptors swapped with their manifests": ("adaptors/k=6-*/manifest.json", swap_folders),
    "one bit in adaptors": ("adaptors/k=6-*/adaptors.safetensors", lambda path: flip(path, -1)),
    "centroids": ("labels/k=4-*/centroids.npy", lambda path: flip(path, -2)),
    "test features zeroed": ("features/average/part0*/rows.npy", zero_a_quarter),
    "the list of bad rows": ("features/backbone/part2*/bad.json", lambda path: path.write_text("{}\n")),
    "ground truth zeroed": ("truth-*/labels.npy", zero_a_quarter),
    "a score": ("scores/average-*/scores.json", lambda path: flip(path, path.read_bytes().index(b"0."))),
    "a figure": ("insight/k=4-*/insight.json", lambda path: path.write_text("{}")),
    "statistics": ("labels/k=4-*/stats.json", lambda path: path.unlink()),
    "partitions": ("partitions-*/partitions.json", lambda path: path.write_bytes(path.read_bytes()[:-20])),
    "the log of a job": ("adaptors/k=4-*/metrics.jsonl", lambda path: path.write_text("")),
    "the exported weights": ("models/average-*/model.safetensors", lambda path: flip(path, -1)),
    "the exported settings": ("models/average-*/config.json", lambda path: flip(path, -3)),
    "the report": ("reports/report-*/report.html", lambda path: flip(path, 500)),
    "a manifest that is no JSON": ("labels/k=4-*/manifest.json", lambda path: path.write_text("{")),
    "an empty manifest": ("scores/k=4-*/manifest.json", lambda path: path.write_text("")),
}


class InThisProcess(tiny.Here):
    """A Runner whose jobs have one rank, in this process: what it raises is raised as it is."""

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        self.asked += [job.name for job in jobs]
        return {job.name: [job.function(tiny.Watcher().context(Comm()), job.spec)] for job in jobs}


IN_RANKS = ("labels", "adaptors")  # what is made by jobs of several processes, which take longest


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_by_name(damage: str, damaged_run: tuple[Path, Config]) -> None:
    root, settings = damaged_run
    pattern, do = DAMAGES[damage]
    path = one(root, pattern)
    do(path)
    found = look_at(artifacts_in(root, settings)).damages
    assert str(path) in {each.path for each in found}
    assert len(found) == (2 if "swapped" in damage else 1)
    assert found[0].folder in {str(artifact.path) for artifact in artifacts_in(root, settings)}


def contents(root: Path) -> dict[str, str]:
    """Digests of all files that a run made, but for those that tell times."""
    told = re.compile(
        rf"(events|run.log|index/|{DAMAGES_FILE}|reports/|report/|manifest.json|errors.log|metrics.jsonl|\.damaged)"
    )
    files = (path for path in root.rglob("*") if path.is_file() and not told.search(str(path.relative_to(root))))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_damaged_is_set_aside_and_made_anew_with_the_same_bytes_and_a_line_says_so(
    finished: tuple[Path, Config], damaged_run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings = damaged_run
    paths = []
    for pattern, do in DAMAGES.values():
        if not pattern.startswith(IN_RANKS) and (path := one(root, pattern)).parent.name not in {
            p.parent.name for p in paths
        }:
            paths.append(path)
            do(path)
    here = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root, here))
    assert {"embed_shards", "compute_statistics", "read_ground_truth", "evaluate"} == set(here.asked)
    assert contents(root) == contents(finished[0])
    asides = {path.parent.relative_to(root) for path in root.glob("**/*.damaged/manifest.json")}
    assert asides == {path.parent.relative_to(root).with_name(f"{path.parent.name}.damaged") for path in paths}
    told = capsys.readouterr().err
    page = (root / "report" / "report.html").read_text()
    for path in paths:
        name = path.parent.relative_to(root).as_posix()
        assert f"damaged: {name}: {path.name} " in told
        assert name in told[told.index("damaged and made anew: ") :]
        assert f"Damaged and made anew: {name}: {path.name}" in page
    again = tiny.Here()
    pipeline.run_in(tiny.run_in(settings, root, again))
    assert again.asked == []
    assert "damaged" not in capsys.readouterr().err
    assert (root / "report" / "report.html").read_text() == page
    assert len(read_damages(root)) == len(paths)


def test_damage_that_is_met_on_the_way_is_mended_and_the_run_goes_on(
    damaged_run: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings = damaged_run
    monkeypatch.setattr("grappa_dist.stages.damages.CONTENT_BYTES", 0)  # as if there were too much to read
    flip(one(root, "features/backbone/part1*/rows.npy"), -1)
    shutil.rmtree(one(root, "partitions-*"))
    shutil.rmtree(one(root, "insight/backbone-*"))
    flip(one(root, "features/backbone/part0-*/rows.npy"), -1)  # of the training and of the test images
    renewed = list[int]()
    here = InThisProcess(num_workers=1)
    monkeypatch.setattr(tiny.Here, "renew_workers", lambda self: renewed.append(1))
    pipeline.run_in(tiny.run_in(settings, root, here))
    assert [damage.file for damage in read_damages(root)] == ["rows.npy"]
    assert renewed == [1]
    assert "embed_shards" in here.asked
    assert "rows.npy does not hold what was written" in capsys.readouterr().err


class Failing(tiny.Here):
    """A runner whose tasks meet an error of their own."""

    def __init__(self, errors: Sequence[Exception]) -> None:
        super().__init__()
        self.errors = list(errors)

    def map(self, function: Any, tasks: Sequence[Any], *callbacks: Any) -> list[Any]:
        if self.errors:
            raise self.errors.pop(0)
        return super().map(function, tasks, *callbacks)


def test_damage_for_the_second_time_ends_the_run(damaged_run: tuple[Path, Config]) -> None:
    root, settings = damaged_run
    rows = one(root, "features/backbone/part1*/rows.npy")
    damage = DamagedArtifact(str(rows), str(rows.parent), "has other bytes")
    shutil.rmtree(one(root, "partitions-*"))
    run = tiny.run_in(settings, root, Failing([damage]))
    mending = Mending(run)
    mending.mend(damage)
    shutil.copytree(next(root.glob("features/backbone/part1*.damaged")), rows.parent)
    with pytest.raises(
        RuntimeError, match=r"rows.npy has other bytes, for the second time in this run: is the storage"
    ):
        mending.mend(damage)
    elsewhere = DamagedArtifact("/other/models/x-0123456789/a", "/other/models/x-0123456789", "is missing")
    for other in (elsewhere, DamagedArtifact(str(root / MANIFEST), str(root), "is missing")):
        with pytest.raises(DamagedArtifact):
            mending.mend(other)
    assert root.is_dir()
    with (root / DAMAGES_FILE).open("a") as file:
        file.write('{"name": "damaged"}\n')
    assert read_damages(root) == mending.damages


def test_what_is_not_seen_is_looked_for_once_more(
    damaged_run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings = damaged_run
    shutil.rmtree(one(root, "partitions-*"))
    pipeline.run_in(tiny.run_in(settings, root, Failing([NotSeen("x/manifest.json is not seen here")])))
    assert "warning: x/manifest.json is not seen here. This run looks again" in capsys.readouterr().err
    shutil.rmtree(one(root, "partitions-*"))
    with pytest.raises(NotSeen, match="y"):
        pipeline.run_in(tiny.run_in(settings, root, Failing([NotSeen("y"), NotSeen("y")])))


def test_manifests_without_checksums_are_read_and_told_once(
    damaged_run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    root, settings = damaged_run
    made = artifacts_in(root, settings)
    for artifact in made:
        content = json.loads((artifact.path / MANIFEST).read_text())
        del content["xxh3"]
        content["files"] = {name: listed["bytes"] for name, listed in content["files"].items()}
        (artifact.path / MANIFEST).write_text(json.dumps(content))
    here = InThisProcess(num_workers=1)
    pipeline.run_in(tiny.run_in(settings, root, here))
    assert here.asked == []
    told = capsys.readouterr().err
    assert told.count(f"{len(made)} artefacts made before there were checksums: sizes alone are checked") == 1
    zero_a_quarter(one(root, "features/average/part0*/rows.npy"))  # which no size tells, but what reads it
    shutil.rmtree(one(root, "scores/average-*"))
    pipeline.run_in(tiny.run_in(settings, root, here))
    assert "rows.npy has a row 0 of norm 0, features must be unit rows" in capsys.readouterr().err
    assert here.asked == ["evaluate", "embed_shards", "evaluate"]


def test_check_reads_what_fits_and_deep_all(damaged_run: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    root, settings = damaged_run
    workers = SimpleNamespace(workers=lambda: [1], facts={}, close=lambda: None)
    monkeypatch.setattr(pipeline, "Cluster", lambda *_: workers)
    before = tiny.files_below(root)
    count = len(artifacts_in(root, settings))
    assert f"\n1 worker can start; {count} artefacts there and whole" in pipeline.check(settings, root, deep=True)
    monkeypatch.setattr(pipeline, "CONTENT_BYTES", 1000)
    weights = one(root, "models/average-*/model.safetensors")
    flip(weights, -1)
    assert re.search(
        r"by all sizes and the content of \d+ of [\d,]+ bytes \(--deep reads", pipeline.check(settings, root)
    )
    with pytest.raises(ValueError, match=rf"1 damaged artefact: {weights} does not hold what was written"):
        pipeline.check(settings, root, deep=True)
    after = tiny.files_below(root)
    assert before.keys() == after.keys()
    assert not workers.checks.writes
