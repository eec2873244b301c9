"""Several adaptor sets in one job: each is what it would be alone, and none is lost when the job ends early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.artifacts import Artifact
from grappa_dist.checksums import DamagedArtifact, set_aside
from grappa_dist.console import METRICS_FILE, read_events
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages import adapt_job, multi_set_jobs
from grappa_dist.stages.adapt_job import AdaptJob
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.multi_set import CLIP, KS, close, job_in, run, weights


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("out", ["packed-1", "packed-2", "sparing", "auto", "compiled", "zero"])
def test_a_set_of_a_multi_set_job_is_the_set_trained_alone(trained: Path, out: str, k: int) -> None:
    close(weights(trained, out, k), weights(trained, "alone", k))


@pytest.mark.parametrize("k", KS)
def test_a_set_of_a_multi_set_job_leaves_the_log_that_it_would_leave_alone(trained: Path, k: int) -> None:
    logs = []
    for out in ("packed-1", "alone"):
        (one,) = job_in(trained, out, (k,)).sets
        logs.append([e for e in read_events(one.artifact.path / "metrics.jsonl") if e["name"] == "step"])
    packed, alone = logs
    assert len(packed) == 3 * tiny.STEPS_PER_EPOCH
    for found, expected in zip(packed, alone, strict=True):
        assert found.keys() == expected.keys()
        assert found["job"] == f"k={k}"
        assert 0 <= found["data_wait_share"] <= 1
        for name in ("step", "lr", "images", "loss", "accuracy", "gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_clipping_bounds_each_set_by_itself(trained: Path) -> None:
    (_, one, _) = job_in(trained, "packed-1").sets
    norms = [e["gradient_norm"] for e in tiny.steps_of(one.artifact.path)]
    assert max(norms) > 2 * CLIP
    unclipped = weights(trained, "unclipped", 4, clip_norm=None)
    assert any(not torch.allclose(t, unclipped[n], atol=1e-3) for n, t in weights(trained, "packed-1", 4).items())


def test_a_multi_set_job_leaves_nothing_but_its_sets(trained: Path) -> None:
    for out in ("packed-1", "packed-2"):
        assert list((trained / out / "packs").iterdir()) == []
        for one in job_in(trained, out).sets:
            assert set(tiny.files_below(one.artifact.path)) == {
                "adaptors.safetensors",
                "metrics.jsonl",
                "manifest.json",
            }


def test_the_short_name_of_a_job_is_unique_and_fits_a_folder(drawn: Path) -> None:
    many = job_in(drawn, "names", (3,)).sets[0]
    sets = [replace(many, num_labels=k, artifact=replace(many.artifact, kind=f"adaptors/k={k}")) for k in range(64)]
    names = {multi_set_jobs.short_name(sets[:count]) for count in (1, 2, 64)}
    names |= {multi_set_jobs.short_name(job_in(drawn, "names", (3,), clip_norm=clip).sets) for clip in (None, 1.0)}
    assert len(names) == 5
    assert all(len(name) < 64 for name in names)
    assert multi_set_jobs.short_name(sets[:1]) == f"k=0-{many.artifact.fingerprint}"


def test_how_a_set_is_trained_does_not_name_it(drawn: Path) -> None:
    names = {one.artifact.name for one in job_in(drawn, "names").sets}
    for where in (
        {"sets_per_job": 8},
        {"micro_batch": 1},
        {"micro_batch": "auto"},
        {"activation_checkpointing": True},
        {"zero_stage": 2},
    ):
        assert {one.artifact.name for one in job_in(drawn, "names", **where).sets} == names
    assert names.isdisjoint(one.artifact.name for one in job_in(drawn, "names", clip_norm=1.0).sets)


@pytest.mark.slow
def test_a_multi_set_job_stopped_on_two_ranks_under_zero_goes_on_alone_and_on_three_ranks(trained: Path) -> None:
    job = job_in(trained, "stopped", zero_stage=1)
    steps = multi_set_jobs.job_folder(job.sets) / "checkpoints"
    assert [path.name for path in sorted(steps.iterdir())] == ["step-000000002", "step-000000004"]
    run_ranks(run_stopped_at, 1, job_in(trained, "stopped", zero_stage=2), 5, timeout_s=400)
    run_ranks(run_stopped_at, 3, job_in(trained, "stopped"), None, timeout_s=400)
    for k in KS:
        close(weights(trained, "stopped", k), weights(trained, "alone", k))
    assert begins(job) == [(2, 0), (1, 4), (3, 6)]


def begins(job: AdaptJob) -> list[tuple[int, int]]:
    """Ranks and first step of every attempt at a finished job, as the log of each of its sets has them."""
    logs = [[e for e in read_events(s.artifact.path / "metrics.jsonl") if e["name"] == "begins"] for s in job.sets]
    (found,) = {tuple((event["ranks"], event["at_step"]) for event in log) for log in logs}
    return list(found)


def run_stopped_at(comm: Comm, job: AdaptJob, step: int | None) -> None:
    run(comm, job, stop_after=step)


def run_killed(comm: Comm, job: AdaptJob, step: int) -> None:
    with pytest.raises(tiny.Killed):
        run(comm, job, kill_after=step)


def test_a_killed_multi_set_job_goes_on_as_it_was_under_any_settings_and_ends_with_the_same_bytes(
    trained: Path,
) -> None:
    job = job_in(trained, "killed")
    run_ranks(run_killed, 1, job, 5, timeout_s=400)
    assert multi_set_jobs.jobs_of(job.sets, 1) == [job.sets]
    assert multi_set_jobs.jobs_of(job.sets[:2], 1) == [
        (job.sets[0],),
        (job.sets[1],),
    ]  # without one of its sets there is no such job
    run_ranks(run, 1, job, timeout_s=400)
    for one, straight in zip(job.sets, job_in(trained, "packed-1").sets, strict=True):
        ours, theirs = ((a.path / ADAPTORS_FILE).read_bytes() for a in (one.artifact, straight.artifact))
        assert ours == theirs


def test_a_kill_between_two_commits_loses_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(trained, "commits")
    commits = []
    real = Artifact.commit

    def once(artifact: Artifact, discard: Any = ()) -> None:
        if commits:
            raise tiny.Killed
        commits.append(artifact)
        real(artifact, discard)

    begun = multi_set_jobs.begin_job(job.sets)
    (begun / METRICS_FILE).write_text("")
    tensors = [weights(trained, "packed-1", k) for k in KS]
    monkeypatch.setattr(Artifact, "commit", once)
    with pytest.raises(tiny.Killed):
        multi_set_jobs.finish_job(job.sets, tensors)
    monkeypatch.undo()
    assert [one.artifact.complete for one in job.sets] == [True, False, False]
    multi_set_jobs.commit_trained(job.sets)
    assert all(one.artifact.complete for one in job.sets)
    assert not begun.exists()


def run_with_late_files(comm: Comm, job: AdaptJob) -> bool:
    """Rank 1 sees none of rank 0's files yet, and must not write any."""
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == 1:
            patch.setattr(Artifact, "complete", property(lambda artifact: False))
            patch.setattr(multi_set_jobs, "begin_job", None)
            patch.setattr(adapt_job, "begin_job", None)
        run(comm, job)
    comm.barrier()  # rank 0 commits after the other is done
    return all(one.artifact.complete for one in job.sets)


def test_rank_zero_alone_decides_whether_a_job_is_done(trained: Path) -> None:
    for out, epochs in (("packed-2", 3), ("late", 1)):
        assert run_ranks(run_with_late_files, 2, job_in(trained, out, epochs=epochs), timeout_s=60) == [True, True]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"sets": 3}'])
def test_a_damaged_list_of_a_jobs_sets_is_named_and_no_longer_in_the_way_once_it_is_set_aside(
    text: str, tmp_path: Path
) -> None:
    job = tmp_path / multi_set_jobs.MULTI_SET_FOLDER / "0123456789"
    job.mkdir(parents=True)
    (job / multi_set_jobs.MULTI_SET_FILE).write_text(text)
    with pytest.raises(DamagedArtifact, match="does not name the sets of a job") as caught:
        multi_set_jobs.multi_set_members(tmp_path)
    assert caught.value.folder == str(job)
    set_aside(job)
    assert multi_set_jobs.multi_set_members(tmp_path) == {}
