"""Copies of unfinished work: whole at every moment, and enough for another machine to resume a job in the middle."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from grappa_dist import object_store, pipeline
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages.mirror import ASIDE, STATE, RemoteFolder, WorkMirror
from grappa_dist.stages.multi_set_jobs import MULTI_SET_FILE
from tests.conftest import Bucket
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.test_mirror import settings_on

ARTIFACTS = 3
WRITES = ("PUT", "POST", "DELETE")


def artifacts_in(root: Path) -> list[Artifact]:
    return [Store(root).artifact(f"fusion/{number}", {"number": number}, {}) for number in range(ARTIFACTS)]


def work_until(artifact: Artifact, step: int) -> Path:
    """The folder of a job after `step` steps: two checkpoints, a longer log, scratch that no restart uses."""
    folder = artifact.begin()
    for at in (step - 1, step):
        checkpoint = folder / "checkpoints" / f"step-{at:09d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "engine.safetensors").write_bytes(bytes([at]) * 1000)
        (checkpoint / "classifier.0-7.safetensors").write_bytes(bytes([at]) * 70)
    for old in sorted((folder / "checkpoints").glob("step-*"))[:-2]:
        shutil.rmtree(old)
    (folder / "knn" / "epoch-0").mkdir(parents=True, exist_ok=True)
    (folder / "knn" / "epoch-0" / "rows-000000.npy").write_bytes(b"graph")
    (folder / "knn" / "epoch-1.partial").mkdir(exist_ok=True)
    (folder / "knn" / "epoch-1.partial" / "features-0.npy").write_bytes(b"scratch")
    (folder / "checkpoints" / ".step-000000099.partial").mkdir(exist_ok=True)
    (folder / "checkpoints" / ".step-000000099.partial" / "engine.safetensors").write_bytes(b"cut")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {at}}}\n' for at in range(step + 1)))
    return folder


def of_restart(step: int) -> dict[str, bytes]:
    return {
        f"checkpoints/step-{step:09d}/engine.safetensors": bytes([step]) * 1000,
        f"checkpoints/step-{step:09d}/classifier.0-7.safetensors": bytes([step]) * 70,
        "knn/epoch-0/rows-000000.npy": b"graph",
        "metrics.jsonl": "".join(f'{{"step": {at}}}\n' for at in range(step + 1)).encode(),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mirror_of(bucket: Bucket, root: Path) -> WorkMirror:
    folder = RemoteFolder(f"{bucket.url}/runs/x")
    return WorkMirror(folder, folder.names(), artifacts_in(root))


def test_another_machine_gets_the_newest_checkpoint_and_what_else_a_restart_can_use(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    first, second, _ = artifacts_in(tmp_path / "a")
    second.begin()  # nothing to go on from
    mirror = mirror_of(bucket, tmp_path / "a")
    for step in (5, 6):
        work_until(first, step)
        mirror.save(())
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == [f"{first.name}.partial"]
    assert contents(artifacts_in(tmp_path / "b")[0].partial) == of_restart(6)
    assert len(bucket.names()) == 5  # state.json and four copies: none of step 5
    bucket.proxy.requests.clear()
    mirror.save(())
    assert not bucket.proxy.requests  # nothing has changed


def test_a_folder_that_was_begun_here_is_left_alone(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    work_until(artifacts_in(tmp_path / "a")[0], 5)
    mirror_of(bucket, tmp_path / "a").save(())
    here = work_until(artifacts_in(tmp_path / "b")[0], 2)
    before = contents(here)
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == []
    assert contents(here) == before


def test_a_copy_is_whole_whatever_request_was_the_last(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    artifact = artifacts_in(tmp_path / "a")[0]
    work_until(artifact, 5)
    mirror_of(bucket, tmp_path / "a").save(())
    for step, allowed in enumerate((*range(6), 100), start=6):
        work_until(artifact, step)
        bucket.proxy.requests.clear()
        bucket.proxy.refuse = lambda method, path, most=allowed: (  # type: ignore[misc]
            403 if method in WRITES and sum(r.method in WRITES for r in bucket.proxy.requests) >= most else None
        )
        mirror = mirror_of(bucket, tmp_path / "a")
        with suppress(ValueError):
            mirror.save(())
        bucket.proxy.refuse = lambda method, path: None
        there = tmp_path / f"b{step}"
        assert mirror_of(bucket, there).fetch(print) == [f"{artifact.name}.partial"]
        found = contents(artifacts_in(there)[0].partial)
        steps = [int(name.split("/")[1][5:]) for name in found if name.endswith("engine.safetensors")]
        assert found == of_restart(steps[0])
    assert steps == [step]  # all requests were allowed in the end
    assert len(bucket.names()) == 5  # and nothing is left of those that were cut off


def test_a_checkpoint_that_goes_while_it_is_copied_is_copied_all_the_same(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    artifact = artifacts_in(tmp_path / "a")[0]
    folder = work_until(artifact, 5)

    def lose(method: str, path: str) -> None:
        if method in WRITES:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / "metrics.jsonl").write_text("")

    bucket.proxy.refuse = lose  # type: ignore[assignment]
    mirror_of(bucket, tmp_path / "a").save(())
    bucket.proxy.refuse = lambda method, path: None
    assert not (tmp_path / "a" / ASIDE).exists()
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == [f"{artifact.name}.partial"]
    assert contents(artifacts_in(tmp_path / "b")[0].partial) == of_restart(5)


def test_checkpoints_that_come_and_go_leave_the_mirror_running(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    artifact = artifacts_in(tmp_path / "a")[0]
    folder, stop = work_until(artifact, 5), threading.Event()

    def churn() -> None:
        for step in range(6, 250):
            if not stop.is_set():
                work_until(artifact, step)

    trainer = threading.Thread(target=churn)
    trainer.start()
    mirror = mirror_of(bucket, tmp_path / "a")
    for _ in range(12):
        with suppress(FileNotFoundError):
            mirror.save(())
    stop.set()
    trainer.join()
    mirror.save(())
    newest = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == [f"{artifact.name}.partial"]
    assert contents(artifacts_in(tmp_path / "b")[0].partial) == of_restart(newest)


def test_copies_go_when_the_store_has_what_is_finished_and_not_before(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    artifact = artifacts_in(tmp_path / "a")[0]
    folder = work_until(artifact, 5)
    mirror = mirror_of(bucket, tmp_path / "a")
    mirror.save(())
    elsewhere = artifacts_in(tmp_path / "b")[0]
    elsewhere.begin()
    elsewhere.commit()
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == []
    shutil.rmtree(folder / "checkpoints")
    artifact.commit()
    mirror.save(())
    assert mirror_of(bucket, tmp_path / "c").fetch(print) == [f"{artifact.name}.partial"]
    mirror.save({artifact.name})
    assert bucket.names() == []


def test_jobs_of_several_sets_are_copied_by_their_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    first, second, third = artifacts_in(tmp_path / "a")
    work_until(first, 5).rename(tmp_path / "moved")
    job = tmp_path / "a" / "packs" / "0123456789"
    job.parent.mkdir()
    (tmp_path / "moved").rename(job)
    (job / MULTI_SET_FILE).write_text(json.dumps({"sets": [first.name, second.name]}))
    mirror_of(bucket, tmp_path / "a").save(())
    assert mirror_of(bucket, tmp_path / "b").fetch(print) == ["packs/0123456789"]
    remote = RemoteFolder(f"{bucket.url}/runs/x")
    stranger = WorkMirror(remote, remote.names(), [third])
    assert stranger.fetch(print) == []
    stranger.save(())
    # a run of other sets has left it alone
    assert mirror_of(bucket, tmp_path / "c").fetch(print) == ["packs/0123456789"]


@pytest.mark.parametrize("place", ["../x.partial", "packs/../../x"])
def test_a_store_cannot_name_a_folder_outside_of_the_run(bucket: Bucket, tmp_path: Path, place: str) -> None:
    bucket.allow_writing()
    state: dict[str, Any] = {"artifacts": [artifacts_in(tmp_path)[0].name], "objects": {"x": "x"}, "sizes": {"x": 1}}
    honest = RemoteFolder(f"{bucket.url}/runs/x")

    class Lying(RemoteFolder):
        def read(self, name: str, parse: Callable[[bytes], Any]) -> Any:
            return parse(json.dumps(state).encode())

    lying = Lying(honest.url)
    assert WorkMirror(lying, [f"{place}/{STATE}"], artifacts_in(tmp_path / "a")).fetch(print) == []
    own = artifacts_in(tmp_path / "a")[0]
    state |= {"artifacts": [own.name], "objects": {"../../x": "x"}}
    with pytest.raises(ValueError, match=r"state.json: names '../../x', outside of its folder"):
        WorkMirror(lying, [f"{own.name}.partial/{STATE}"], artifacts_in(tmp_path / "a")).fetch(print)


class Stopped(Exception):
    pass


class StopsInAdapt(tiny.Here):
    """Ends a run in its first adaptor job, some steps behind its newest checkpoint."""

    def run_jobs(self, jobs: Sequence[Job], done: Any = lambda name: None) -> dict[str, list[Any]]:
        if jobs[0].name != "k=4":
            return super().run_jobs(jobs, done)
        with pytest.raises(RuntimeError):
            run_ranks(killed_in_job, jobs[0].ranks, jobs[0])
        raise Stopped


def killed_in_job(comm: Comm, job: Job) -> None:
    job.function(tiny.Watcher(kill_after=8).context(comm), job.spec)


@pytest.mark.long
def test_a_run_that_lost_its_directory_goes_on_in_the_middle_of_a_job(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    settings = settings_on(bucket, tmp_path)
    settings = settings.model_copy(update={"adapt": settings.adapt.model_copy(update={"epochs": 5})})
    with pytest.raises(Stopped):
        pipeline.run_in(tiny.run_in(settings, tmp_path / "run", StopsInAdapt()), "adapt")
    shutil.rmtree(tmp_path / "run")
    pipeline.run_in(tiny.run_in(settings, tmp_path / "elsewhere", tiny.Here()), "adapt")
    alone = settings.model_copy(update={"mirror": None})
    pipeline.run_in(tiny.run_in(alone, tmp_path / "alone", tiny.Here()), "adapt")
    for straight in sorted((tmp_path / "alone" / "adaptors").glob("k=*")):
        resumed = tmp_path / "elsewhere" / "adaptors" / straight.name
        assert (resumed / ADAPTORS_FILE).read_bytes() == (straight / ADAPTORS_FILE).read_bytes()
    assert {event["step"] for event in tiny.steps_of(resumed)} == set(range(15))


@pytest.mark.parametrize("damage", [b"x" * 9, None])
def test_a_damaged_copy_of_work_is_not_used_and_the_work_begins_anew(
    bucket: Bucket, tmp_path: Path, damage: bytes | None
) -> None:
    bucket.allow_writing()
    artifact, told = artifacts_in(tmp_path / "a")[0], list[str]()
    work_until(artifact, 5)
    mirror_of(bucket, tmp_path / "a").save(())
    (key,) = (name for name in bucket.names() if "engine.safetensors@" in name)
    size = len(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    if damage is None:
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    else:
        bucket.put(key, damage[:1] * size)  # of the same size
    assert mirror_of(bucket, tmp_path / "b").fetch(told.append) == []
    assert not artifacts_in(tmp_path / "b")[0].partial.exists()
    assert "engine.safetensors" in told[0]
    assert "not used, so this begins anew" in told[0]
    assert mirror_of(bucket, tmp_path / "b").fetch(told.append) == []
    assert len(told) == 1


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"artifacts": 1}', b'{"artifacts": [], "objects": [1]}'])
def test_a_damaged_list_of_copies_ends_no_run(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)
    bucket.allow_writing()
    work_until(artifacts_in(tmp_path / "a")[0], 5)
    mirror_of(bucket, tmp_path / "a").save(())
    (key,) = (name for name in bucket.names() if name.endswith(STATE))
    bucket.put(key, text)
    told = list[str]()
    for _ in range(2):
        assert mirror_of(bucket, tmp_path / "b").fetch(told.append) == []
    assert len(told) == 1
    assert f"{STATE} is damaged" in told[0]
