"""A run directory on an object store: the run of a local directory, which goes on in an empty folder elsewhere."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grappa_dist import pipeline
from grappa_dist.artifacts import Store
from grappa_dist.bucket import _Kept, folder_of
from grappa_dist.checksums import verified
from grappa_dist.clean import clean
from grappa_dist.cli.embed import command as embed
from grappa_dist.config import CONFIG_FILE, Config, Resources
from grappa_dist.console import EVENTS_FILE, Console, Events, read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.seeds import run_seeds
from grappa_dist.stages.damages import read_damages
from grappa_dist.stages.run import placed, run_root, running
from grappa_dist.stages.run_on_bucket import restored
from grappa_dist.status import describe_status, status
from tests.cli.calling import called
from tests.conftest import Bucket
from tests.processes import run_ranks
from tests.stages import tiny

NEW_MOUNTS, PRIVATE = 0x20000, 0x44000  # CLONE_NEWNS; MS_PRIVATE | MS_REC


def settings_in(folder: Path, bucket: Bucket) -> Config:
    """A run with a k-NN graph and several adaptor sets in one job, on images that lie here."""
    paths = tiny.write_shards(folder / "images")
    fuse = {"variants": ("average", "neighbours"), "epochs": 3}
    settings = tiny.config(paths, adapt={"epochs": 5, "sets_per_job": 2}, fuse=fuse, resources={"adapt_ranks": 2})
    return settings.model_copy(update={"out": f"{bucket.url}/runs/tiny"})


def run_on(settings: Config, machine: Path, runner: tiny.Here, until: str | None = None) -> Path:
    """A driver on a machine whose folder is empty at first; the folder of the run there."""
    root = folder_of(str(settings.out), str(machine))
    store = Store(root)
    with store.lock() as lease:
        files = restored(root, lease)
        assert files is not None
        try:
            run = replace(tiny.run_in(settings, root, runner), files=files, console=Console(Events(root / EVENTS_FILE)))
            with run.console.run():
                pipeline.run_in(run, until)
        finally:
            files.send()
    return root


def made_in(root: Path) -> dict[str, bytes]:
    """The files of all finished artefacts, but for what has times in it."""
    manifests = [path for path in root.rglob("*-??????????/manifest.json") if not path.relative_to(root).is_symlink()]
    found = {}
    for folder in (path.parent for path in manifests if path.parent.name not in ("model", "report")):
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in ("manifest.json", "metrics.jsonl", "metrics.json", "report.html"):
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def in_bucket(bucket: Bucket) -> dict[str, bytes]:
    """The same of the objects below runs/tiny, as a copy of the bucket would have them."""
    names = [name for name in bucket.names() if name.startswith("runs/tiny/")]
    whole = {name.rpartition("/")[0] for name in names if name.endswith("/manifest.json")}
    found = {}
    for name in names:
        inside = any(name.startswith(f"{folder}/") for folder in whole)
        left_out = name.endswith(("manifest.json", "metrics.jsonl", "metrics.json", "report.html"))
        if inside and not left_out and not name.startswith(("runs/tiny/model/", "runs/tiny/report/")):
            body = bucket.client.get_object(Bucket=bucket.name, Key=name)["Body"].read()
            found[name.removeprefix("runs/tiny/")] = body
    return found


class Apart(tiny.Here):
    """A runner whose ranks are machines of their own: each sees an empty folder where the driver has its runs."""

    def __init__(self, runs: Path) -> None:
        super().__init__()
        self.runs = runs

    def run_jobs(self, jobs: Sequence[Job], done: Any = lambda name: None) -> dict[str, list[Any]]:
        self.asked += [job.name for job in jobs]
        found = {}
        for job in jobs:
            found[job.name] = run_ranks(rank_apart, job.ranks, job, self.runs)
            done(job.name)
        return found


def rank_apart(comm: Comm, job: Job, runs: Path) -> Any:
    hide(runs)
    return job.function(tiny.Watcher().context(comm), job.spec)


def hide(folder: Path) -> None:
    """Mounts an empty file system over a folder, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(NEW_MOUNTS),
        libc.mount(b"none", b"/", None, PRIVATE, None),
        libc.mount(b"own", os.fsencode(folder), b"tmpfs", 0, b"size=200m"),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_hide() -> bool:
    return os.geteuid() == 0 and shutil.which("unshare") is not None and os.system("unshare -m true") == 0


@pytest.mark.slow
def test_a_run_on_a_bucket_is_the_local_run_and_goes_on_in_an_empty_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    settings = settings_in(tmp_path, bucket)
    settings = settings.model_copy(update={"fuse": settings.fuse.model_copy(update={"variants": ("average",)})})
    local = tmp_path / "local"
    pipeline.run_in(tiny.run_in(settings, local, tiny.Here()))
    root = run_on(settings, tmp_path / "a", tiny.Here())
    assert made_in(root) == made_in(local) == in_bucket(bucket)
    assert read_damages(root) == []
    names = bucket.names()
    assert {f"runs/tiny/{name}" for name in ("model/model.safetensors", "report/report.html")} <= set(names)
    assert not [name for name in names if ".partial" in name or "/packs/" in name or "clock" in name]

    shutil.rmtree(tmp_path / "a")
    again = tiny.Here()
    root = run_on(settings, tmp_path / "b", again)
    assert again.asked == []
    assert (root / "report" / "report.html").is_file()
    assert (root / "model" / "model.safetensors").is_file()
    assert in_bucket(bucket) == made_in(local)
    stages = [event["stage"] for event in read_events(root / EVENTS_FILE) if event["name"] == "stage_ends"]
    assert {"embed", "pseudo_label", "adapt", "evaluate"} <= set(stages)  # of the machine before
    seen = status(folder_of(str(settings.out), str(tmp_path / "c")))
    assert (seen.run, seen.state) == (settings.out, "done")
    assert f"{settings.out}/report/report.html" in describe_status(seen)


def test_a_setting_names_the_disk_of_a_machines_copies_also_for_a_run_that_goes_on(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    where, url = Resources(copies_dir=str(tmp_path / "disk")), f"{bucket.url}/runs/x"
    default, root = run_root(url, ""), run_root(url, "", where)
    assert [path.relative_to(tmp_path).parts[0] for path in (default, root)] == ["tmp", "disk"]
    assert root.parent.name == default.parent.name == f"grappa-runs-{os.getuid()}"
    assert placed(default, where) == root
    assert placed(default, Resources()) == default
    assert placed(tmp_path, where) == tmp_path  # a directory is where it is


def test_a_run_bounds_the_copies_of_its_machine_by_its_setting(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    monkeypatch.setattr(_Kept, "most", None)
    settings = tiny.config(["images"], resources={"copies_bytes": 5})
    with running(settings, folder_of(f"{bucket.url}/runs/x", str(tmp_path))):
        assert _Kept.most == 5


def test_the_settings_of_a_driver_that_is_at_work_stay_whoever_asks_for_the_run(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    settings = tiny.config(["images"], resources={"copies_dir": str(tmp_path)})
    where, url = settings.resources, f"{bucket.url}/runs/x"
    root = run_root(url, "", where)
    with Store(root).lock():
        (root / CONFIG_FILE).write_text("new")  # not sent yet
        assert run_root(url, "", where) == root
        assert (root / CONFIG_FILE).read_text() == "new"
        bucket.put(f"runs/x/{CONFIG_FILE}", b"old")
        run_root(url, "", where)
        assert (root / CONFIG_FILE).read_text() == "new"
    run_root(url, "", where)
    assert (root / CONFIG_FILE).read_text() == "old"


def test_what_works_in_directories_alone_refuses_a_bucket_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "s3://bucket/runs")
    found = called(embed, "--images", "images", "--model", "model", "--out", "$PLACE/x")
    assert (found.status, "--out s3://bucket/runs/x: embeddings are written to a directory" in found.err) == (2, True)
    settings, root = tiny.config(["images"]), folder_of("s3://bucket/runs/x", str(tmp_path))
    with pytest.raises(ValueError, match="s3://bucket/runs/x: --clean looks through a directory"):
        clean(settings, root, remove=True)
    with pytest.raises(ValueError, match="--seeds with out=s3://bucket/runs/x"):
        run_seeds(settings, root, [0, 1])


def test_events_are_sent_in_parts_that_are_added_and_begin_anew_with_their_file(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    root = folder_of(f"{bucket.url}/runs/tiny", str(tmp_path / "a"))
    with Store(root).lock() as lease:
        files = restored(root, lease)
        assert files is not None
        for lines in (b'{"t": 1}\n{"t', b'": 2}\n'):
            with open(root / EVENTS_FILE, "ab") as file:
                file.write(lines)
            files.send_events()
        files.send_events()
        parts = [name for name in bucket.names() if "/events/" in name]
        assert parts == ["runs/tiny/events/00000001.jsonl", "runs/tiny/events/00000002.jsonl"]
        (root / EVENTS_FILE).write_bytes(b'{"t": 3}\n')
        files.send()
        assert [name for name in bucket.names() if "/events/" in name] == ["runs/tiny/events/00000003.jsonl"]
    other = folder_of(f"{bucket.url}/runs/tiny", str(tmp_path / "b"))
    with Store(other).lock() as lease:
        restored(other, lease)
    assert (other / EVENTS_FILE).read_bytes() == b'{"t": 3}\n'


@pytest.mark.slow
@pytest.mark.skipif(not can_hide(), reason="needs root and mount namespaces: ranks would share a folder")
def test_ranks_that_share_nothing_but_the_bucket_make_what_one_folder_has(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    settings = settings_in(tmp_path, bucket)
    local = tmp_path / "local"
    pipeline.run_in(tiny.run_in(settings, local, tiny.Here()))
    (tmp_path / "a").mkdir()
    root = run_on(settings, tmp_path / "a", Apart(tmp_path / "a"))
    assert in_bucket(bucket) == made_in(local)
    assert not [name for name in bucket.names() if ".partial" in name or "/packs/" in name]
    assert (root / "report" / "report.html").is_file()
    assert read_damages(root) == []


KILL_AT = {"k=4": 12, "neighbours": 5}  # steps, some after a checkpoint


def killed_after_a_checkpoint(comm: Comm, job: Job, runs: Path, step: int) -> Any:
    hide(runs)
    return job.function(tiny.Watcher(kill_after=step).context(comm), job.spec)


class Fails(Apart):
    """Loses all machines in the middle of a job."""

    def __init__(self, runs: Path, job: str) -> None:
        super().__init__(runs)
        self.job = job

    def run_jobs(self, jobs: Sequence[Job], done: Any = lambda name: None) -> dict[str, list[Any]]:
        if not jobs[0].name.startswith(self.job):
            return super().run_jobs(jobs, done)
        with pytest.raises(RuntimeError):
            run_ranks(killed_after_a_checkpoint, jobs[0].ranks, jobs[0], self.runs, KILL_AT[self.job])
        raise ConnectionError(f"all machines are lost in {jobs[0].name}")


@pytest.mark.long
@pytest.mark.skipif(not can_hide(), reason="needs root and mount namespaces: ranks would share a folder")
@pytest.mark.parametrize("job", list(KILL_AT))
def test_a_run_whose_machines_are_all_lost_goes_on_in_the_middle_of_a_job_on_others(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    bucket.allow_writing()
    settings = settings_in(tmp_path, bucket)
    local = tmp_path / "local"
    pipeline.run_in(tiny.run_in(settings, local, tiny.Here()))
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(ConnectionError):
        run_on(settings, tmp_path / "a", Fails(tmp_path / "a", job))
    shutil.rmtree(tmp_path / "a")
    root = run_on(settings, tmp_path / "b", Apart(tmp_path / "b"))
    assert in_bucket(bucket) == made_in(local)
    folder = next(root.glob(f"adaptors/{job}-*" if job == "k=4" else f"fusion/{job}-*"))
    begun = [event for event in read_events(verified(folder / "metrics.jsonl")) if event["name"] == "begins"]
    assert read_damages(root) == []
    assert [event["at_step"] > 0 for event in begun] == [False, True]
