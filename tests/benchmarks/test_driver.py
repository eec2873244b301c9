"""The benchmark of the driver, small: what it prints, and what its stand-ins count."""

from __future__ import annotations

import json

import pytest

from benchmarks.driver import LISTING, PLACEMENT, run

SMALL = {"shards": 6, "rows": 5, "workers": 8, "nodes": 2, "jobs": 4, "ranks": 2, "tasks": 20}


def test_the_figures_of_half_the_size_and_of_the_whole_are_printed_with_their_ratios() -> None:
    text, numbers = run({**SMALL, "sections": [LISTING, PLACEMENT]}, lambda line: None)
    written = json.loads(json.dumps(numbers))
    assert [one["shards"] for one in written[LISTING]] == [3, 6]
    assert [one["workers"] for one in written[PLACEMENT]] == [4, 8]
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["jobs: run_rank"][-3:] == ["4", "8", "2.0"]
    assert lines["tasks: run"][-3:] == ["10", "20", "2.0"]
    assert {"open, CPU s", "--dry-run, CPU s", "message with one shard, kB"} <= lines.keys()


def test_a_job_that_half_of_the_workers_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="--ranks must be at most 4, half of --workers, got 5"):
        run({**SMALL, "ranks": 5, "sections": [PLACEMENT]}, lambda line: None)
