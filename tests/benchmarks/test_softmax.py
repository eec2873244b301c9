from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import softmax
from benchmarks.softmax import (
    CHUNKED,
    MATERIALISED,
    MATERIALISED_STEP,
    SAMPLED_STEP,
    SHARDED_STEP,
    SoftmaxSettings,
    as_json,
    as_text,
    measure_softmax,
)
from grappa_dist.distributed.collectives import Comm

SMALL = SoftmaxSettings(classes=20_000, dim=8, batch=64, sampled=0.1, ranks=2, threads=2, steps=1, repeats=1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take a hundred times as long
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_side_is_timed_and_materialised_logits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(work: Any, size: int, *args: Any) -> list[Any]:
        return [work(Comm(), *args)] * size

    monkeypatch.setattr(softmax, "run_workers", here)  # no processes of their own
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    logged = list[str]()
    sides = measure_softmax(SMALL, logged.append)
    assert len(logged) == len(sides) == 6
    found = {side["name"]: side for side in as_json(SMALL, sides)["sides"]}
    assert all(len(side["runs_s"]) == 1 and side["seconds"] > 0 for side in found.values())
    assert found[MATERIALISED]["extra_bytes"] > SMALL.logit_bytes
    assert found[CHUNKED]["baseline"] == MATERIALISED
    assert found[SAMPLED_STEP]["baseline"] != MATERIALISED
    step = 4 * SMALL.classes * SMALL.dim * 3  # weights and Adam
    assert found[MATERIALISED_STEP]["rank_bytes"] > step + found[MATERIALISED_STEP]["extra_bytes"]
    lines = as_text(SMALL, sides).splitlines()
    assert sum(SHARDED_STEP in line for line in lines) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_allocator_kept_of_the_first_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * 2**20

    def step(at: int) -> None:
        for _ in range(20):  # the first ones teach the allocator to keep such blocks
            torch.ones(count).add_(1)

    monkeypatch.setitem(softmax._SIDES, "keeping", lambda comm, settings: step)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert softmax._measure_rank(Comm(), "keeping", SMALL).growth > 0.9 * 4 * count


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"classes": 0}, "--classes must be"), ({"sampled": 1.0}, "--sampled must"), ({"ranks": 3}, "--threads must be")],
)
def test_settings_that_cannot_be_measured_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxSettings(**{**vars(SMALL), **changed}).check()  # type: ignore[arg-type]
