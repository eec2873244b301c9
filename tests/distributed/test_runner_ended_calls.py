"""News of calls that have ended: of attempts that are over, of failures, and of ends that were not reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.distributed import runner as runner_module
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import EndedCalls, Job, Runner, _Running

ROOT = Path(__file__).resolve().parents[2]


class Call:
    """A reference to a call that ends when the test says so."""

    def __init__(self) -> None:
        self.reported = Future[str]()
        self.ended = False

    def future(self) -> Future[str]:
        return self.reported

    def end(self, error: Exception | None = None) -> None:
        self.ended = True
        if error is None:
            self.reported.set_result("done")
        else:
            self.reported.set_exception(error)


class Waits:
    """Ray, of which only `wait` is asked; the sizes of what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def wait(self, refs: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        assert refs, "Ray refuses to wait for nothing"
        assert timeout == 0
        self.asked.append(len(refs))
        return [ref for ref in refs if ref.ended], [ref for ref in refs if not ref.ended]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=waits.wait))
    monkeypatch.setattr(runner_module, "POLL_S", 0.05)
    return waits


def under_way(name: str, ranks: int, calls: EndedCalls) -> _Running:
    running = _Running(Job(name, print, None, ranks), [], [Call() for _ in range(ranks)], set())
    calls.watch(running)
    return running


def test_a_job_is_news_when_its_last_call_has_ended_and_others_are_not_asked_about(ray: Waits) -> None:
    calls = EndedCalls()
    running = {name: under_way(name, 3, calls) for name in "abc"}
    first, second, third = running["b"].refs
    second.end()
    first.end()
    assert calls.wait(running) == []
    assert running["b"].pending == {third}
    third.end()
    assert calls.wait(running) == [running["b"]]
    assert calls.wait(running) == []
    assert ray.asked == []


def test_a_job_is_news_at_its_first_call_that_fails(ray: Waits) -> None:
    calls = EndedCalls()
    running = {name: under_way(name, 3, calls) for name in "ab"}
    running["a"].refs[2].end(OSError("a worker died"))
    assert calls.wait(running) == [running["a"]]
    assert len(running["a"].pending) == 2


def test_calls_of_an_attempt_that_is_over_or_of_a_job_that_has_ended_are_no_news(ray: Waits) -> None:
    calls = EndedCalls()
    over, gone = under_way("a", 2, calls), under_way("gone", 1, calls)
    again = under_way("a", 2, calls)
    for ref in [*over.refs, *gone.refs]:
        ref.end(OSError("killed"))
    assert calls.wait({"a": again}) == []
    before = again.refs
    again.refs = [Call(), Call()]  # its workers have answered and were given the work
    calls.watch(again)
    before[0].end(OSError("late"))
    assert calls.wait({"a": again}) == []
    assert again.pending == set(again.refs)


def test_an_end_that_was_not_reported_is_found_by_a_look_at_all_calls(
    ray: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "LOOK_S", 0.1)
    calls = EndedCalls()
    running = {name: under_way(name, 2, calls) for name in "abc"}
    running["c"].refs[0].ended = True  # which is not reported
    found, end = list[_Running](), time.monotonic() + 20
    while not found and time.monotonic() < end:
        found = calls.wait(running)
    assert found == [running["c"]]
    assert ray.asked == [6]
    for one in running.values():
        one.pending.clear()
    time.sleep(0.11)
    assert calls.wait(running) == []  # nothing to look at


def test_calls_that_end_at_once_in_other_threads_are_all_reported(ray: Waits) -> None:
    calls = EndedCalls()
    running = {str(n): under_way(str(n), 2, calls) for n in range(200)}
    refs = [ref for r in running.values() for ref in r.refs]
    threads = [threading.Thread(target=lambda part=n: [ref.end() for ref in refs[part::4]]) for n in range(4)]
    for thread in threads:
        thread.start()
    found, end = list[_Running](), time.monotonic() + 20
    while len(found) < 200 and time.monotonic() < end:
        found += calls.wait(running)
    for thread in threads:
        thread.join()
    assert sorted(r.job.name for r in found) == sorted(running)


class Unreadable:
    """A result that the process it was made for cannot read."""

    def __init__(self, reader: int) -> None:
        self.reader = reader

    def __reduce__(self) -> Any:
        return read_elsewhere, (self.reader,)


def read_elsewhere(reader: int) -> Unreadable:
    if os.getpid() == reader:
        raise ValueError("not here")
    return Unreadable(reader)


def answer(device: torch.device, task: tuple[str, int, str]) -> Any:
    """A large result, one that the driver cannot read, or the death of the process at its first call."""
    kind, driver, marker = task
    if kind == "dies" and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"large": torch.ones(300_000), "unreadable": Unreadable(driver)}.get(kind, kind)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(Resources(workers=2, num_cpus=2, max_restarts=1))
        try:
            cluster.workers()
            yield cluster
        finally:
            cluster.close()


@pytest.mark.parametrize("reported", [True, False])
def test_large_results_and_deaths_are_noticed_whether_or_not_ray_reports_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: bool
) -> None:
    if not reported:
        monkeypatch.setattr(EndedCalls, "_put", lambda *_: None)
        monkeypatch.setattr(runner_module, "LOOK_S", 0.1)
    failed = list[str]()
    runner = Runner(
        cluster, cluster.resources, on_event=lambda name, **figures: failed.append(name) if "failed" in name else None
    )
    kinds = ["small", "large", "dies", "small"]
    results = runner.map(answer, [(kind, os.getpid(), str(tmp_path / "died")) for kind in kinds])
    assert torch.equal(results.pop(1), torch.ones(300_000))
    assert results == ["small", "dies", "small"]
    assert failed == ["job_failed"]


def test_a_result_that_cannot_be_read_is_a_failure(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match=r"answer 0 failed 2 times, last with: .*not here"):
        Runner(cluster, cluster.resources).map(answer, [("unreadable", os.getpid(), "")])


PROGRAM = """
import sys, time
from grappa_dist.config import Resources
from grappa_dist.distributed.placement import FreeWorkers
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from tests.distributed.test_runner_ended_calls import sleep

where = Resources(workers=1, num_cpus=1)
runner = Runner(Cluster(where), where)
(worker,) = runner.cluster.workers()
job = runner._start(Job("sleep", sleep, 1000.0, 0), FreeWorkers(runner.cluster.node_of, [worker]))
while not job.begun:
    for one in runner.ended.wait({"sleep": job}):
        runner._outcome(one)
runner.cluster.close()
sys.exit(7)
"""


def sleep(device: torch.device, seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.slow
def test_a_process_that_leaves_ray_while_a_call_is_under_way_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert "Traceback" not in ended.stderr
