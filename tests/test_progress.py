from __future__ import annotations

from typing import Any

import pytest

from grappa_dist.progress import PRIOR, Counter, RunTime, about, describe, describe_jobs, duration, gist, stage_left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0s"), (0.04, "0.0s"), (59.4, "59.4s"), (59.6, "1m00s"), (61, "1m01s")),
        *((3599, "59m59s"), (3600, "1h00m"), (7260, "2h01m"), (48 * 3600, "2d00h")),
    ],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_estimate_says_so_and_has_no_tenths() -> None:
    assert [about(s) for s in (0.2, 12.4, 59.6, 3700)] == ["about 0s", "about 12s", "about 1m00s", "about 1h01m"]


def test_a_status_leaves_out_what_is_not_known() -> None:
    assert describe({}) == ""
    assert describe({"phase": "epoch 3: exact k-NN graph"}) == "epoch 3: exact k-NN graph"
    assert describe({"done": 5, "of": 9, "unit": "images"}) == "5/9 images"
    assert describe({"done": 5, "of": 9, "images_per_s": 12.3, "left_s": 4.2}) == "5/9 12 img/s about 4s left"
    assert describe({"done": 9, "of": 9, "images_per_s": 12.3, "left_s": 0.0}) == "9/9 12 img/s"  # nothing is left
    assert describe_jobs({"k=4": {"done": 1, "of": 2, "waiting": 3}, "k=5": {}}) == "k=4: 1/2 | 3 waiting"


def test_rates_and_times_alone_are_nothing_new() -> None:
    status = {"done": 5, "of": 9, "images_per_s": 12.3, "left_s": 4.2}
    assert gist({"k=4": status}) == gist({"k=4": status | {"images_per_s": 11.0, "left_s": 5.0}})
    assert gist({"k=4": status}) != gist({"k=4": status | {"done": 6}})
    assert gist({"k=4": status}) != gist({"k=5": status})


def counter_of(*sizes: int, unit: str = "images") -> tuple[Counter, list[float], list[dict[str, Any]]]:
    now, shown = [100.0], list[Any]()
    return Counter(sizes, shown.append, unit, clock=lambda: now[0]), now, shown


def test_images_are_counted_within_tasks_and_the_rate_begins_with_the_first_batch() -> None:
    counter, now, shown = counter_of(60, 40)
    now[0] += 30  # until workers are up
    counter.running([{"done": 0}, {}])
    assert shown == []
    counter.running([{"done": 8, "seconds": 2.0}, {"done": 4, "seconds": 1.0}])
    assert shown == [{"done": 12, "of": 100, "unit": "images", "images_per_s": 6.0, "left_s": 88 / 6}]
    now[0] += 8
    counter(0)
    assert (shown[-1]["done"], shown[-1]["images_per_s"], shown[-1]["left_s"]) == (60, 6.0, 40 / 6)
    counter.running([{"done": 20, "seconds": 5.0}])
    counter.running([{"done": 3, "seconds": 0.5}])  # its process died and it was begun again
    assert shown[-1]["done"] == 80
    counter(1)
    assert (shown[-1]["done"], shown[-1]["left_s"]) == (100, 0.0)


def test_without_reports_a_rate_is_known_from_the_second_task_on_and_only_images_have_one() -> None:
    counter, now, shown = counter_of(1, 1, 1, unit="models")
    now[0] += 20
    counter(1)
    assert shown == [{"done": 1, "of": 3, "unit": "models"}]
    now[0] += 4
    counter(0)
    assert shown[-1] == {"done": 2, "of": 3, "unit": "models", "left_s": 4.0}


def test_the_time_left_of_a_stage_counts_jobs_that_wait() -> None:
    half = {"done": 50, "of": 100, "left_s": 5.0}
    assert stage_left({"k=4": half, "k=5": half | {"left_s": 6.0}}) == 6.0
    assert stage_left({"k=4": half | {"waiting": 3}, "k=5": half | {"waiting": 3}}) == 5 + 2 * 10
    assert stage_left({"k=4": half, "k=5": {"phase": "compiling"}}) is None
    assert stage_left({"k=4": {"done": 100, "of": 100, "left_s": 0.0, "waiting": 1}}) is None
    assert stage_left({}) is None


def test_the_time_left_of_a_run_follows_what_its_stages_really_take() -> None:
    assert RunTime().left_s(3.0, 4.0) is None  # nothing is expected
    run = RunTime({"embed": [10.0, 5.0], "adapt": [40.0], "fuse": [20.0, 20.0]}, stage="embed")

    def longer(took: float, expected: float) -> float:
        return (took + PRIOR * 95) / (expected + PRIOR * 95)

    assert run.left_s(4.0, None) == 91  # as expected so far
    assert run.left_s(4.0, 16.0) == 16 + 85 * longer(20, 10)
    run.end(20.0)
    run.stage = "adapt"
    assert run.left_s(0.0, None) == pytest.approx(85 * longer(20, 10))
    assert run.left_s(30.0, 10.0) == 10 + 45 * longer(60, 50)
    run.end(40.0)
    run.stage = "partitions"  # which nobody expected
    assert run.left_s(5.0, None) == 45 * longer(60, 50)
    run.end(5.0)
    run.stage = "fuse"
    run.end(14.0)
    run.stage = "fuse"
    assert run.left_s(4.0, 6.0) == 6 + 5 * longer(84, 90)
    run.end(10.0)
    run.stage = "fuse"  # once more than expected
    assert run.left_s(1.0, 3.0) == pytest.approx(3 + 5 * longer(84, 90))


def test_a_short_stage_that_takes_long_says_little_of_a_long_run() -> None:
    run = RunTime({"embed": [1.0], "adapt": [999.0]}, stage="embed")
    run.end(10.0)
    assert (run.left_s(0.0, None) or 0) < 1100


def test_the_start_of_workers_is_no_part_of_the_stage_that_waits_for_it() -> None:
    run = RunTime({"start": [14.0], "embed": [10.0], "adapt": [40.0]}, stage="embed")
    run.starting = True
    assert run.left_s(4.0, None) == 10 + 50
    assert run.left_s(30.0, None) == 50
    run.started(30.0)
    assert run.left_s(34.0, None) == 6 + 40
    twice = (20 + PRIOR * 50) / (10 + PRIOR * 50)
    assert run.left_s(34.0, 16.0) == 16 + 40 * twice
    run.end(50.0)
    assert run.ended == {"start": [30.0], "embed": [20.0]}
    run.stage = "adapt"
    run.started(3.0)  # they are up already
    assert run.left_s(0.0, None) == pytest.approx(40 * twice)
