"""Many workers: what the driver asks of Ray grows with jobs and tasks, not with their number times that of workers."""

from __future__ import annotations

import pytest

from benchmarks.driver import place


@pytest.mark.parametrize("workers", [8, 64])
def test_a_task_takes_two_calls_of_a_worker_and_a_job_two_of_each_rank_and_one_message(workers: int) -> None:
    found = place(workers, workers // 4, (16, 4), tasks=3 * workers)
    start, jobs, tasks = found.counts
    assert start["ready"] == start["actor"] == workers
    assert start["wait"] < 5
    assert (jobs["free_address"], jobs["run_rank"]) == (64, 64)
    assert jobs["put"] == 16  # what a job is about is sent once, whatever its ranks
    assert (tasks["free_address"], tasks["run"]) == (3 * workers, 3 * workers)
    assert tasks["put"] == 0
    assert max(start["nodes"], jobs["nodes"], tasks["nodes"]) <= 3
    for counts, works in ((jobs, 64), (tasks, 3 * workers)):
        looks = counts["wait"] - 3 * works  # at all calls, once in LOOK_S: this machine may be slow
        assert counts["waits"] <= 4 * works
        assert counts["references waited for"] <= 6 * works + max(0, looks) * workers
        assert counts["kill"] == 0


def test_a_job_of_one_rank_is_sent_as_it_is() -> None:
    _, jobs, _ = place(4, 2, (3, 1), tasks=1).counts
    assert jobs["put"] == 0
    assert jobs["run_rank"] == 3
